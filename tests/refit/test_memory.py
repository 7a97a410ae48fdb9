"""The memory that least squares are predicted to take is what they allocate."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for, bound_of, cut_by
from test_search import with_search
from transformers import BertForMaskedLM, LlamaForCausalLM

from hf_dms import repair_
from hf_dms.cut.plan import Plan
from hf_dms.refit import repair
from hf_dms.refit.memory import refitted_bytes, repair_bytes


def sizes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("cut", [{}, {"hidden": (torch.arange(20),)}])
@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM])
def test_repair(cls, cut, monkeypatch):
    model = tiny(cls)
    bound, batches = bound_of(model), batches_for(model, batches=4)
    parts, states, targets_of_layers = [], [], repair.targets_of_layers

    def update(modules, sums, ridge, name):
        parts.append(sum(sizes_of(*vars(part).values()) for part in sums))

    def targets(teacher, layers, units):
        places, found = targets_of_layers(teacher, layers, units)
        copies = 3 if cut else 2  # of both models, and the dense states in front of the layer
        states.append(copies * sizes_of(*teacher.hidden) + sum(sizes_of(*shelf) for shelf in found.values()))
        return places, found

    monkeypatch.setattr(repair, "update_", update)
    monkeypatch.setattr(repair, "targets_of_layers", targets)
    plan = Plan({"mlp": (torch.arange(20),) * bound.rows("mlp")} | cut)
    repair_(cut_by(model, plan), model, plan, batches)
    sums, hidden = repair_bytes(bound, sum(batch["input_ids"].numel() for batch in batches), 4, frozenset(cut))
    share = max(parts) * 6 / 4 / sums  # four parts are held, and two more are made of them
    assert (0.3 if cut else 0.9) < share <= 1.1
    assert (0.8 * hidden if cut else hidden) <= max(states) <= hidden


@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM])
def test_a_search_over_refitted_weights(cls):
    model, search = with_search(cls)
    search.refresh_()
    maps = [module.forward.args[2] for module in model.modules() if "forward" in vars(module)]
    assert maps
    kept = sum(sizes_of(each.factor, each.solved) for each in maps)
    for each in maps:
        kept += 2 * sizes_of(each.weight(each.num_units))
    kept += sizes_of(*search.factors.values())
    assert refitted_bytes(bound_of(model), frozenset(search.dims)) == pytest.approx(kept, rel=0.15)
