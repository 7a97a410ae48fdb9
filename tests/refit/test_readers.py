"""The maps that read a cut stream get the weights of the ridge regression, and the model's outputs come closer."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for, bound_of, captured, cut_by, layers_of
from helpers.tiny import relative_difference
from transformers import (
    BeitForImageClassification,
    BertForMaskedLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from hf_dms import repair_
from hf_dms.cut.plan import Plan
from hf_dms.cut.verify import outputs_of
from hf_dms.refit.readers import Readers

HIDDEN = torch.arange(24)[torch.arange(24) % 4 != 1]
MLP = (torch.arange(20), torch.arange(2, 20, 2), torch.arange(7))
# With random weights. Models whose stream itself is normalised gain less.
CLASSES = (LlamaForCausalLM, Qwen2ForCausalLM, GraniteForCausalLM, ViTForImageClassification)
READERS = {  # of the first layer; maps with the same inputs and biases stand together
    LlamaForCausalLM: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    BertForMaskedLM: ("attention.self.query", "attention.self.key", "attention.self.value"),
    BeitForImageClassification: ("attention.q_proj", "attention.v_proj"),
}


@pytest.mark.parametrize("cls", READERS)
def test_maps_that_read_get_the_ridge_regression_of_what_their_outputs_lack(cls):
    model = tiny(cls, dtype=torch.float64)
    plan, batches, ridge = Plan({"hidden": (HIDDEN,)}), batches_for(model), 0.1
    pruned = cut_by(model, plan)
    modules = [layers_of(pruned)[0].get_submodule(path) for path in READERS[cls]]
    dense = [layers_of(model)[0].get_submodule(path) for path in READERS[cls]]
    inputs = captured(pruned, modules[0], batches)[0].flatten(0, -2)
    strength = (ridge * inputs.square().mean(0).sum() * len(inputs) / inputs.shape[1]).sqrt()
    if modules[0].bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    rows = torch.cat([inputs, strength * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    changes = []
    for ours, theirs in zip(modules, dense):
        missing = captured(model, theirs, batches)[1] - captured(pruned, ours, batches)[1]
        missing = missing.flatten(0, -2)
        aim = torch.cat([missing, missing.new_zeros(inputs.shape[1], missing.shape[1])])
        changes.append(torch.linalg.lstsq(rows, aim).solution)
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    repair_(pruned, model, plan, batches, ridge=ridge)
    for module, was, change in zip(modules, before, changes):
        assert relative_difference(module.weight - was["weight"], change[: len(HIDDEN)].T) < 1e-6
        if module.bias is not None:
            assert relative_difference(module.bias - was["bias"], change[len(HIDDEN)]) < 1e-6


@pytest.mark.parametrize("more", [{}, {"mlp": MLP}, {"layers": (torch.tensor([0, 2]),)}])
@pytest.mark.parametrize("cls", CLASSES)
def test_outputs_come_closer_than_by_the_maps_that_write_alone(cls, more, monkeypatch):
    model = tiny(cls)
    plan, held_out = Plan({"hidden": (HIDDEN,)} | more), batches_for(model, seed=2)
    errors = []
    for refit in (Readers.refit_, lambda *args: None):
        monkeypatch.setattr(Readers, "refit_", refit)
        pruned = cut_by(model, plan)
        repair_(pruned, model, plan, batches_for(model, seed=1))
        errors.append(sum(float((outputs_of(pruned, b) - outputs_of(model, b)).square().mean()) for b in held_out))
    assert errors[0] < 0.97 * errors[1]


def test_zeros_behind_the_kept_units_stay_zeros():
    model = tiny(LlamaForCausalLM)
    plan = Plan({"hidden": (HIDDEN,), "mlp": MLP})
    pruned = cut_by(model, plan, "padded")
    before = [layer.mlp.gate_proj.weight.clone() for layer in layers_of(pruned)]
    repair_(pruned, model, plan, batches_for(model))
    for layer, weight, kept in zip(layers_of(pruned), before, MLP):
        assert not torch.equal(layer.self_attn.q_proj.weight, weight[: len(layer.self_attn.q_proj.weight)])
        assert torch.equal(layer.mlp.gate_proj.weight[len(kept) :], weight[len(kept) :])
        assert not weight[len(kept) :].any()


def test_a_whole_stream_leaves_the_maps_that_read_it_alone(monkeypatch):
    monkeypatch.setattr(Readers, "__init__", lambda *args: pytest.fail("there is nothing to read anew"))
    model = tiny(LlamaForCausalLM)
    plan = Plan({"mlp": MLP})
    repair_(cut_by(model, plan), model, plan, batches_for(model))


def test_a_stream_that_convolutions_alone_read_is_not_kept_a_second_time(monkeypatch):
    monkeypatch.setattr(Readers, "__init__", lambda *args: pytest.fail("no linear map reads the stream"))
    model = tiny(ResNetForImageClassification)
    cut = {"hidden2": (torch.arange(bound_of(model).sizes["hidden2"] // 2),)}
    repair_(cut_by(model, Plan(cut)), model, Plan(cut), batches_for(model))
