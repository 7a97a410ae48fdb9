"""A plan is read back as it was written, and a file for another model is refused."""

import json

import pytest
import torch
from helpers.laws import tiny
from helpers.tiny import search_, tiny_llama
from transformers import BertForSequenceClassification

from hf_dms import DMSConfig, attach_
from hf_dms.cut.plan import PLAN_FILE, load_plan, plan_to_json
from hf_dms.cut.prune import plan_of
from hf_dms.gating.attach import gates_of


@pytest.fixture
def made(tmp_path):
    """A plan, the architecture it is for, and its file."""
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.6, layout="per_layer"))
    search_(model)
    plan, bound = plan_of(model), gates_of(model).attachment.bound
    (tmp_path / PLAN_FILE).write_text(plan_to_json(plan, bound, "per_layer"))
    return plan, bound, tmp_path / PLAN_FILE


def test_a_plan_is_read_as_it_was_written(made):
    plan, bound, file = made
    for path in (file, file.parent):
        found, layout = load_plan(path, bound)
        assert layout == "per_layer"
        assert found.kept.keys() == plan.kept.keys()
        assert all(torch.equal(a, b) for name in plan.kept for a, b in zip(found.kept[name], plan.kept[name]))


def test_the_file_says_which_units_of_how_many_stay(made):
    plan, _, file = made
    content = json.loads(file.read_text())
    assert content["units"] == {"kv": 3, "mlp": 20, "hidden": 24, "layers": 3}
    assert content["kept"]["mlp"][1] == plan.kept["mlp"][1].tolist()
    assert len(content["kept"]["hidden"]) == 1
    assert len(file.read_text().splitlines()) < 25  # one line per row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99, this hf_dms knows up to 1. Update hf_dms"),
        ({"model_type": "bert"}, "is for a bert model, this one is a llama"),
        ({"kept": {"heads": [[0]]}}, "llama has no dim 'heads'. Its dims are kv, mlp, hidden, layers"),
        ({"kept": {"d": [[0, 1]]}, "units": {"d": 4}}, "llama has no dim 'd'. Its dims are kv, mlp, hidden, layers"),
        (
            {"units": {"kv": 3, "mlp": 21, "hidden": 24, "layers": 3}},
            r"is for 3 × 21 units of mlp, this model has 3 × 20",
        ),
        ({"kept": {"mlp": [[0]]}}, "is for 1 × 20 units of mlp, this model has 3 × 20"),
        ({"log_scales": {"mlp": ["AAAA"]}}, "log_scales.mlp has 1 rows, expected 3"),
        ({"log_scales": {"d": ["AAAA"]}}, "log_scales.d has 1 rows, expected 0"),
        ({"log_scales": {"norms.hidden": ["AAAA"]}}, "log_scales.norms.hidden has 1 rows, expected 7"),
        (
            {"log_scales": {"norms.hidden": ["AAAA"] * 7}},
            "log_scales.norms.hidden has 3 bytes, expected 4 for each of 24",
        ),
        ({"log_scales": {"mlp": ["AAAA"] * 3}}, r"log_scales.mlp has 3 bytes, expected 4 for each of \d+ units"),
        ({"log_scales": {"mlp": ["%"] * 3}}, "log_scales.mlp is not base64"),
        (
            {"kept": {"mlp": [[0]] * 3}, "log_scales": {"mlp": ["AADAfw=="] * 3}},
            "log_scales.mlp has numbers that are not",
        ),
        ({"kept": {"mlp": [[1, 0], [0], [0]]}}, "kept.mlp must hold ascending indices from 0 to 19"),
        ({"kept": {"mlp": [[0], [20], [0]]}}, "kept.mlp must hold ascending indices from 0 to 19"),
        ({"kept": {"mlp": [[0], [], [0]]}}, r"at \$.kept.mlp\[1\], \[\] should be non-empty"),
    ],
)
def test_a_plan_of_another_model_is_refused(made, change, message):
    _, bound, file = made
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_plan(file, bound)


def test_a_dim_that_follows_another_is_in_a_plan_too(tmp_path):
    model = tiny(BertForSequenceClassification)
    attach_(model, DMSConfig(target=0.6, layout="uniform"))
    search_(model)
    plan, bound = plan_of(model), gates_of(model).attachment.bound
    (tmp_path / PLAN_FILE).write_text(plan_to_json(plan, bound, "uniform"))
    found, _ = load_plan(tmp_path, bound)
    assert bound.spec.dim("pool").follows is not None
    assert torch.equal(found.kept["pool"][0], plan.kept["pool"][0])


def test_what_is_no_plan_is_refused(made, tmp_path):
    _, bound, file = made
    with pytest.raises(ValueError, match="There is no plan"):
        load_plan(tmp_path / "nothing", bound)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_plan(file, bound)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is not what this hf_dms writes: at .*'format' is a required property"):
        load_plan(file, bound)
