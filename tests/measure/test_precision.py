"""bfloat16 on a CPU is timed, and the user is warned where it is slow."""

import re

import pytest
import torch

from hf_dms.experiment.prepare import prepare
from hf_dms.experiment.recipe import load_recipe
from hf_dms.measure import precision
from hf_dms.measure.precision import SLOW, slow_bfloat16, slowdown_of_bfloat16


def test_a_product_is_timed_in_both_precisions(monkeypatch):
    """The clock is replaced by one that counts products of float32 and of bfloat16."""
    seen = []
    matmul = torch.Tensor.__matmul__

    def counted(left, right):
        seen.append(left.dtype)
        return matmul(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: sum(40 if d == torch.bfloat16 else 1 for d in seen))
    assert slowdown_of_bfloat16() == 40


@pytest.mark.parametrize("times", [SLOW - 0.1, 57.2])
def test_only_a_slow_one_is_said_and_each_key_has_its_way_out(monkeypatch, times):
    monkeypatch.setattr(precision, "slowdown_of_bfloat16", lambda: times)
    assert slow_bfloat16([]) == ""
    said = slow_bfloat16(["train.bf16", "model.dtype"])
    slower = "bfloat16 is 57 times slower than float32 on this CPU .*: "
    expected = slower + (
        "train.bf16 counts as false, and the weights stay in bfloat16 unless you write model.dtype: float32"
    )
    assert re.match(expected, said) if times > SLOW else said == ""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ""),
        (["train.bf16=true"], "train.bf16 counts as false."),
        (["recover={max_steps: 1, bf16: true}"], "recover.bf16 counts as false."),
        (["train.bf16=true", "recover={max_steps: 1, bf16: false}"], "train.bf16 counts as false."),
        (["model.dtype=bfloat16"], "write model.dtype: float32."),
        (["model.dtype=auto"], ""),  # the checkpoint has float32
    ],
)
def test_a_recipe_that_asks_for_it_is_told_before_the_search(recipe, monkeypatch, caplog, overrides, words):
    monkeypatch.setattr(precision, "slowdown_of_bfloat16", lambda: 60.0)
    assert recipe(*overrides, command="validate")[0] == 0
    said = [record.message for record in caplog.records if "bfloat16" in record.message]
    assert len(said) == bool(words)
    assert not words or words in said[0]


@pytest.mark.parametrize(("times", "computes"), [(60.0, [False, False, False]), (0.5, [True, True, False])])
def test_trainings_fall_back_to_float32_where_it_is_slow(recipe, monkeypatch, tmp_path, times, computes):
    monkeypatch.setattr(precision, "slowdown_of_bfloat16", lambda: times)
    overrides = ["train.bf16=true", "finetune={max_steps: 1}", "recover={max_steps: 1, bf16: false}"]
    arguments = prepare(load_recipe(str(tmp_path / "recipe.yaml"), overrides)).arguments
    assert [arguments[stage].bf16 for stage in ("search", "finetune", "recover")] == computes
    assert {arguments[stage].max_steps for stage in ("finetune", "recover")} == {1}
