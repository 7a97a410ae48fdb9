"""The Python of the README runs as it stands."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import Tokens, tiny_llama
from transformers import AutoModelForCausalLM, default_data_collator

from hf_dms.verify import outputs_of

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # the README's TrainingArguments are for any machine
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    trainer_block, loop_block, repair_block = BLOCKS[:3]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path: tiny_llama())
    names = {"dataset": Tokens(), "collator": default_data_collator}
    exec(trainer_block.replace("max_steps=500", "max_steps=4, disable_tqdm=True").replace("16}", "4}"), names)
    dense = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert sum(parameter.numel() for parameter in names["pruned"].parameters()) <= 0.6 * dense
    assert (tmp_path / "smaller" / "config.json").is_file()
    batches = [{name: row[None] for name, row in Tokens()[i].items()} for i in range(12)]
    names |= {"model": tiny_llama(), "batches": batches}
    exec(loop_block, names)
    assert sum(parameter.numel() for parameter in names["pruned"].parameters()) <= 0.6 * dense
    before = copy.deepcopy(names["pruned"])
    exec(repair_block, names)
    assert not torch.equal(outputs_of(names["pruned"], batches[0]), outputs_of(before, batches[0]))
