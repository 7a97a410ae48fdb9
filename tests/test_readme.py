"""The Python of the README and of pages without a test of their own runs, on tiny models."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.laws import searched, tiny
from helpers.recipes import WORDS
from helpers.tiny import Tokens, search_, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, ResNetBackbone, default_data_collator

from hf_dms import DMSConfig, attach_, prune, save_pruned
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


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_python_of_the_page_on_adapters_runs(tmp_path, monkeypatch):
    (code,) = blocks_of("adapters.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path: tiny_llama())
    names = {"dataset": Tokens(), "collator": default_data_collator}
    exec(code.replace("max_steps=300", "max_steps=12, disable_tqdm=True"), names)
    assert type(names["pruned"]).__name__ == "DmsLlamaForCausalLM"
    assert not any("lora" in name for name, _ in names["pruned"].named_parameters())


def test_the_python_of_the_page_on_architectures_loads_a_backbone(tmp_path, monkeypatch):
    (code,) = blocks_of("architectures.md")
    monkeypatch.chdir(tmp_path)
    model = tiny(ResNetBackbone, hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 1, 1])
    searched(model, prune=("mid", "hidden"), layout="per_layer")
    save_pruned(prune(model), "cut")
    names: dict = {}
    exec(code, names)
    assert type(names["backbone"]).__name__ == "DmsResNetBackbone"
    sizes = names["backbone"].config.hidden_sizes
    assert names["backbone"].channels == [sizes[1], sizes[3]]
    assert sizes[3] < 20


def test_the_python_of_the_page_on_runtimes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for layout, folder in (("uniform", "quickstart"), ("per_layer", "smollm2-per-layer")):
        model = tiny_llama()
        attach_(model, DMSConfig(target=0.8, layout=layout))
        search_(model)
        save_pruned(prune(model), tmp_path / "outputs" / folder)
    for code in blocks_of("runtimes.md"):
        exec(code, names := {})
        found.append(type(names["model"]).__module__.partition(".")[0])
    assert found == ["transformers", "hf_dms"]


def test_the_python_of_the_page_on_several_processes_runs(tmp_path):
    """In a group of one process, in which the mean over processes is the process's own."""
    (code,) = blocks_of("distributed.md")
    found = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for run in (code, "model.dms_gates.update_importance_()"):
            attach_(model := tiny_llama().train(), DMSConfig(target=0.8, warmup_steps=0))
            batch = Tokens()[0]["input_ids"][None]
            model(batch, labels=batch).loss.backward()
            exec(run, {"model": model, "torch": torch})
            found.append(torch.cat([model.dms_gates.raw_importance(name).flatten() for name in model.dms_gates.dims]))
    finally:
        torch.distributed.destroy_process_group()
    assert found[0].sum() > 0
    assert torch.equal(*found)
