"""docs/strategies.md: its Python runs, and its table lists every strategy and the dims that it is defined for."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_llama, token_batch

from hf_dms import DMSConfig, HfDmsError, attach_
from hf_dms.strategies.one_shot import CRITERIA, criterion_of

PAGE = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
KINDS = {"all dims": {"layer", "model", "depth"}, "widths": {"layer"}, "layers": {"depth"}}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page defines, after all of its Python has run on a tiny model."""
    folder = tmp_path_factory.mktemp("page")
    tiny_llama().save_pretrained(folder)
    batches = [token_batch(seed=seed) for seed in range(4)]
    names = {"__name__": __name__, "batches": [batch | {"labels": batch["input_ids"]} for batch in batches]}
    before, kept = sum(p.numel() for p in tiny_llama().parameters()), []
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code.replace('"model"', repr(str(folder))), names)
        kept.append(sum(p.numel() for p in names["pruned"].parameters()) / before)
    return names | {"kept": kept}


def test_the_python_of_the_page_runs_and_meets_its_budget(page):
    assert len(page["kept"]) == 4
    assert max(page["kept"]) <= 0.8


def test_the_page_s_criterion_is_what_it_says(page):
    model, seen = tiny_llama(), []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(**token_batch())
    handle.remove()
    attach_(model, DMSConfig(target=0.8, prune=("mlp",), layout="per_layer"))
    found = page["activity"](model, [token_batch()])["mlp"][1]
    assert torch.allclose(found, seen[0].detach().abs().mean((0, 1)))


def test_the_table_of_the_page_is_that_of_the_strategies():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    told = {name: (data, dims) for names, data, dims, *_ in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(told) == {"dms", *CRITERIA}
    for name, criterion in CRITERIA.items():
        data, dims = told[name]
        assert set().union(*(KINDS[kind] for kind in dims.split(", "))) == set(criterion.dims), name
        assert (data not in ("weights", "nothing")) == criterion.needs_data, name


# ---- a strategy of one's own, by where it is ----
def test_a_criterion_of_one_s_own_is_named_by_its_module(page, monkeypatch):
    module = types.ModuleType("my_module")
    module.ACTIVITY, module.other = page["ACTIVITY"], 3
    monkeypatch.setitem(sys.modules, "my_module", module)
    assert criterion_of("my_module:ACTIVITY") is page["ACTIVITY"]
    with pytest.raises(HfDmsError, match=r"'my_module:other' must be a .*Criterion, got int"):
        criterion_of("my_module:other")
    with pytest.raises(HfDmsError, match=r"'my_module:missing' cannot be imported"):
        criterion_of("my_module:missing")
    with pytest.raises(HfDmsError, match=r"'no_such_module:X' cannot be imported: No module named"):
        criterion_of("no_such_module:X")
