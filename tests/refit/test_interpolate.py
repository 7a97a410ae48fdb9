"""The loss decides how much of a repair stays."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for, cut_by
from transformers import LlamaForCausalLM

from hf_dms import repair_
from hf_dms.cut.plan import Plan
from hf_dms.refit.interpolate import SHARES, Interpolation

MLP = (torch.arange(20), torch.arange(2, 20, 2), torch.arange(7))


def labelled(model):
    return [batch | {"labels": batch["input_ids"]} for batch in batches_for(model)]


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def repaired(interpolate):
    model = tiny(LlamaForCausalLM)
    plan = Plan({"mlp": MLP})
    pruned = cut_by(model, plan)
    before = weights(pruned)
    shares = []
    repair_(pruned, model, plan, labelled(model), interpolate=interpolate and shares.append)
    return pruned, before, shares


@torch.no_grad()
def loss(model, batches):
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def test_the_best_of_the_shares_stays():
    after = weights(repaired(False)[0])
    pruned, before, (share,) = repaired(True)
    judges = labelled(pruned)[::4]
    kept = loss(pruned, judges)
    assert share in SHARES
    losses = {}
    for each in SHARES:
        pruned.load_state_dict({name: torch.lerp(before[name], after[name], each) for name in before}, strict=False)
        losses[each] = loss(pruned, judges)
    assert kept == pytest.approx(min(losses.values()), abs=1e-6)
    assert losses[share] == min(losses.values())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_ends_of_the_line_are_exact(monkeypatch, share):
    model = tiny(LlamaForCausalLM)
    line, before = Interpolation(model), weights(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    after = weights(model)
    monkeypatch.setattr(Interpolation, "loss", lambda self, batches: 0.0 if self_share(self) == share else 1.0)

    def self_share(line):
        now = line.model.lm_head.weight
        return (
            0.0
            if torch.equal(now, before["lm_head.weight"])
            else 1.0
            if torch.equal(now, after["lm_head.weight"])
            else 0.5
        )

    line.keep_best_share_([])
    assert line.share == share
    assert all(torch.equal(weight, (after if share else before)[name]) for name, weight in weights(model).items())


def test_a_repair_that_ruins_the_model_is_taken_back():
    model = tiny(LlamaForCausalLM)
    batches, line, before = labelled(model), Interpolation(model), weights(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    line.keep_best_share_(batches)
    assert line.share == 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_labels_are_needed():
    model = tiny(LlamaForCausalLM)
    plan = Plan({"mlp": MLP})
    pruned = cut_by(model, plan)
    before = weights(pruned)
    with pytest.raises(ValueError, match="batches need labels"):
        repair_(pruned, model, plan, batches_for(model), interpolate=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(pruned).items())
