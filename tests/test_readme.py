"""The Python of the README runs as it stands, and its table of architectures is that of the descriptions."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arch_table import END, heads, renewed
from helpers.tiny import Tokens, tiny_llama
from transformers import AutoModelForCausalLM, default_data_collator

from hf_dms.archs.bert import BERT
from hf_dms.archs.llama import LLAMA
from hf_dms.cut.verify import outputs_of

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def check_searched(gates, plan):
    """What a training loop is for: importance of every unit, ratios that moved, and a cut that follows both."""
    assert gates.num_updates == 12
    assert all((gates.raw_importance(name) > 0).all() for name in gates.dims)
    assert float(gates.prune_ratio.detach().max()) > 0
    rows = [(name, i, row) for name, kept in plan.kept.items() for i, row in enumerate(kept)]
    for name, i, row in rows:
        assert torch.equal(row, gates.raw_importance(name)[i].topk(len(row)).indices.sort().values)
    last = [torch.equal(row, torch.arange(gates.dims[name].units)[-len(row) :]) for name, i, row in rows]
    assert not all(last)  # as if all units were alike
    assert not last[[name for name, *_ in rows].index("hidden")]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # the README's TrainingArguments are for any machine
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
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


# ---- the table of architectures ----
def test_the_table_of_architectures_is_that_of_the_descriptions():
    assert README.count(END) == 1
    command = "python tools/arch_table.py README.md"
    assert renewed(README) == README, f"the README's table of architectures is out of date. Run {command}"


def test_a_table_that_is_out_of_date_is_replaced_and_the_text_around_it_stays():
    assert renewed(README.replace("causal LM", "other heads").replace("`deit` |", "`other` |")) == README


def test_heads_are_those_whose_parameters_have_lines():
    assert heads(BERT) == ["base", "masked LM", "question answering", "sequence classification", "token classification"]
    assert heads(replace(BERT, heads={})) == ["base"]
    without_pooler = {name: axes for name, axes in BERT.params.items() if not name.startswith("pooler")}
    assert heads(replace(BERT, params=without_pooler)) == ["masked LM", "question answering", "token classification"]
    without_output = {name: axes for name, axes in LLAMA.params.items() if name != "lm_head.weight"}
    assert "causal LM" in heads(LLAMA)
    assert "causal LM" not in heads(replace(LLAMA, params=without_output))
