"""Reconstruction: the maps that learn together, the gain on unseen data, and what does not change."""

import pytest
import torch
from helpers.laws import tiny
from helpers.marks import ordinary_if
from helpers.refit import batches_for, bound_of, captured, cut_by, layers_of, text
from transformers import (
    BeitForImageClassification,
    BertForMaskedLM,
    Dinov2ForImageClassification,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    ViTForImageClassification,
)

from hf_dms import repair_
from hf_dms.cut.plan import Plan
from hf_dms.refit.layerwise import LayerWalk
from hf_dms.refit.reconstruct import sub_block
from hf_dms.refit.writes import find_stream_modules

MLP = (torch.arange(20), torch.arange(2, 20, 2), torch.arange(7))
PLANS = {
    "widths": Plan({"mlp": MLP}),
    "all": Plan(
        {
            "mlp": MLP,
            "layers": (torch.tensor([0, 2]),),
            "hidden": (torch.arange(24)[torch.arange(24) % 4 != 1],),
        }
    ),
}
SUB_BLOCKS = {
    LlamaForCausalLM: [{"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}],
    BertForMaskedLM: [{"query", "key", "value", "attention.output.dense"}, {"intermediate.dense", "output.dense"}],
    ViTForImageClassification: [{"q_proj", "k_proj", "v_proj", "o_proj"}, {"fc1", "fc2"}],
}


@torch.no_grad()
@pytest.mark.parametrize("cls", SUB_BLOCKS)
def test_a_sub_block_is_what_lies_between_two_writes_into_the_stream(cls):
    model = tiny(cls)
    walk = LayerWalk(model, bound_of(model), batches_for(model, batches=1))
    places = find_stream_modules(walk)
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in walk.layers[0].named_parameters()}
    found = [[names[id(weight)] for weight in sub_block(walk, places, 0, path)] for path in places.writes]
    assert len(found) == len(SUB_BLOCKS[cls])
    for names_found, expected in zip(found, SUB_BLOCKS[cls]):
        assert len(names_found) == len(expected)
        assert all(any(name.endswith(each) for each in expected) for name in names_found)


RELATIVES = (GraniteForCausalLM, Dinov2ForImageClassification, BeitForImageClassification)
CASES = [(cls, "widths") for cls in [*SUB_BLOCKS, Gemma2ForCausalLM, *RELATIVES]]


@pytest.mark.parametrize(
    ("cls", "plan"), ordinary_if(lambda cls, plan: cls not in RELATIVES, [*CASES, (LlamaForCausalLM, "all")])
)
def test_the_stream_comes_closer_than_by_least_squares_on_held_out_data(cls, plan):
    model = tiny(cls)
    held_out, units = batches_for(model, seed=2), PLANS[plan].kept.get("hidden", (slice(None),))[0]
    expected = captured(model, layers_of(model)[-1], held_out)[1][:, units]

    def error(epochs):
        pruned = cut_by(model, PLANS[plan])
        repair_(pruned, model, PLANS[plan], batches_for(model, seed=1), epochs=epochs)
        return float((captured(pruned, layers_of(pruned)[-1], held_out)[1] - expected).square().mean())

    assert error(4) < error(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_matrices_of_layers_move_and_all_stays_as_it_was_otherwise(dtype):
    model = tiny(LlamaForCausalLM, dtype=dtype)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = cut_by(model, PLANS["widths"])
    pruned.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    required = {name: parameter.requires_grad for name, parameter in pruned.named_parameters()}
    repair_(pruned, model, PLANS["widths"], batches_for(model), epochs=3)
    assert {name: parameter.requires_grad for name, parameter in pruned.named_parameters()} == required
    assert all(parameter.grad is None for parameter in pruned.parameters())
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
    after = pruned.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("_proj.weight" in name for name in moved)
    assert any("gate_proj" in name for name in moved)  # least squares alone do not change these maps


def test_it_is_the_same_whatever_was_drawn_before():
    def weights(seed):
        model = tiny(LlamaForCausalLM)
        pruned = cut_by(model, PLANS["widths"])
        torch.manual_seed(seed)
        repair_(pruned, model, PLANS["widths"], batches_for(model), epochs=2)
        return pruned.state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights(0).values(), weights(1).values()))


def test_a_single_batch_is_an_error_since_one_is_held_out():
    model = tiny(LlamaForCausalLM)
    pruned = cut_by(model, PLANS["widths"])
    with pytest.raises(ValueError, match="with epochs one batch is held out, so it needs at least two, got one"):
        repair_(pruned, model, PLANS["widths"], text(1, batches=1), epochs=1)
