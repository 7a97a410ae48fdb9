"""The Python of docs/python.md runs unchanged, and that of the README on a tiny model."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.recipes import WORDS
from helpers.tiny import Tokens, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator

from hf_dms.cut.verify import outputs_of

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
SUPERNET = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "supernet.md").read_text(), re.DOTALL)
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def check_searched(gates, plan):
    """Assert what a training loop must achieve: importance of every unit, moved ratios, and a cut that follows both."""
    assert gates.num_updates == 12
    assert all((gates.raw_importance(name) > 0).all() for name in gates.dims)
    assert float(gates.prune_ratio.detach().max()) > 0
    rows = [(name, i, row) for name, kept in plan.kept.items() for i, row in enumerate(kept)]
    for name, i, row in rows:
        assert torch.equal(row, gates.raw_importance(name)[i].topk(len(row)).indices.sort().values)
    last = [torch.equal(row, torch.arange(gates.dims[name].units)[-len(row) :]) for name, i, row in rows]
    assert not all(last)  # not the last units, which go if all importance is equal
    assert not last[[name for name, *_ in rows].index("hidden")]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # the page's TrainingArguments are for any machine
def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    trainer_block, loop_block, repair_block = BLOCKS[:3]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path: tiny_llama())
    names = {"dataset": Tokens(), "collator": default_data_collator}
    exec(trainer_block.replace("max_steps=500", "max_steps=12, disable_tqdm=True").replace("16}", "4}"), names)
    dense = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert sum(parameter.numel() for parameter in names["pruned"].parameters()) <= 0.6 * dense
    assert (tmp_path / "smaller" / "config.json").is_file()
    batches = [{name: row[None] for name, row in Tokens()[i].items()} for i in range(12)]
    names |= {"model": tiny_llama(), "batches": batches}
    exec(loop_block, names)
    assert sum(parameter.numel() for parameter in names["pruned"].parameters()) <= 0.6 * dense
    check_searched(names["gates"], names["plan"])
    before = copy.deepcopy(names["pruned"])
    exec(repair_block, names)
    assert not torch.equal(outputs_of(names["pruned"], batches[0]), outputs_of(before, batches[0]))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_python_of_the_page_on_supernets_runs(tmp_path, monkeypatch):
    (code,) = SUPERNET
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path: tiny_llama().config)
    names = {"dataset": Tokens(), "collator": default_data_collator}
    begin, end = code.replace("max_steps=500", "max_steps=12, disable_tqdm=True").split("fresh_weights_(found")
    exec(begin, names)
    searched = copy.deepcopy(names["found"])
    exec(f"fresh_weights_(found{end}", names)
    assert sum(p.numel() for p in names["found"].parameters()) <= sum(p.numel() for p in tiny_llama().parameters())
    assert not any(map(torch.equal, names["found"].parameters(), searched.parameters()))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_python_of_the_readme_prunes_and_prints_it(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 20))} for i in range(1, 12)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (code,) = README
    for given, here in (
        ("models/smollm2-135m", str(dense)),
        ("recipes/data/sotu_train.jsonl", "text.jsonl"),
        ("max_steps=100", "max_steps=12, disable_tqdm=True"),
    ):
        assert code.count(given) == 1
        code = code.replace(given, here)
    exec(code, names := {})
    before, after = re.search(r"([\d,]+) -> ([\d,]+) parameters", capsys.readouterr().out).groups()
    assert int(after.replace(",", "")) < int(before.replace(",", ""))
    layers = [names[name].model.layers.parameters() for name in ("pruned", "model")]
    pruned, whole = (sum(parameter.numel() for parameter in each) for each in layers)
    assert 0.7 * whole < pruned <= 0.8 * whole
    assert AutoModelForCausalLM.from_pretrained("smaller").num_parameters() == names["pruned"].num_parameters()
    assert (tmp_path / "smaller" / "tokenizer_config.json").is_file()
