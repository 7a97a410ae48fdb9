"""Gates on a running model: training and evaluation see them, and they leave nothing behind."""

import copy
import functools

import pytest
import torch
from helpers.laws import batch_for, tiny
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch, trace, untouched
from transformers import (
    LlamaModel,
    RegNetForImageClassification,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from hf_dms import DMSConfig, attach_, detach_
from hf_dms.archs.bind import bind
from hf_dms.archs.llama import LLAMA
from hf_dms.archs.resnet import RESNET
from hf_dms.cut.prune import make_plan
from hf_dms.cut.slicing import cut
from hf_dms.cut.verify import hard_masked, outputs_of
from hf_dms.gating import hooks
from hf_dms.gating.attach import freeze_, gates_of, has_gates
from hf_dms.gating.hooks import _mask_reader
from hf_dms.gating.places import masked_batch_norms, masked_inputs, norms
from hf_dms.masked_ops import Span

DIMS = ("kv", "mlp", "hidden", "layers")


# ---- where they go ----
def after_a_step(cls, **options):
    """Gradients and importance of a soft-masked model after a step, and the statistics of its batch norms."""
    model = tiny(cls, dtype=torch.float64, **options)
    attach_(model, DMSConfig(target=0.6, layout="per_layer"))
    search_(model)
    model.train()(**batch_for(model), labels=torch.tensor([0, 2])).loss.backward()
    gates = gates_of(model)
    gates.update_importance_()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: gradient for name, gradient in gradients.items() if "k_proj.bias" not in name}  # always 0
    importance = {f"importance of {name}": gates.raw_importance(name).clone() for name in gates.dims}
    statistics = {name: buffer.double() for name, buffer in model.named_buffers() if "running" in name}
    return gradients | importance | statistics


def assert_same_step(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert relative_difference(tensor, theirs[name]) < 1e-5, name  # gradients of masks are float32


RESIDUAL = [(ResNetForImageClassification, {}), (ResNetForImageClassification, {"layer_type": "basic"})]
RESIDUAL += [(ResNetForImageClassification, {"embedding_size": 8}), (RegNetForImageClassification, {})]


@pytest.mark.parametrize(("cls", "options"), [*RESIDUAL, (RegNetForImageClassification, {"layer_type": "x"})])
def test_masks_on_batch_norms_do_what_masks_behind_their_relus_do(cls, options, monkeypatch):
    masked = []

    def noted(module, gates, parts, axis):
        masked.extend(name for name, _, _ in parts)
        return mask_reader(module, gates, parts, axis)

    monkeypatch.setattr(hooks, "_mask_reader", noted)
    mask_reader = _mask_reader
    ours = after_a_step(cls, **options)
    assert {name.rstrip("012") for name in masked} <= {"squeeze", "first", "embedding"}
    if cls is ResNetForImageClassification:
        assert not masked
    monkeypatch.setattr(hooks, "masked_batch_norms", lambda bound, name: ())
    theirs = after_a_step(cls, **options)
    assert len(masked) > 10
    assert_same_step(ours, theirs)


def test_batch_norms_with_masks_are_left_as_they_were():
    model = tiny(ResNetForImageClassification)
    norms_before = {path: dict(module._parameters) for path, module in model.named_modules() if "normaliz" in path}
    attach_(model, DMSConfig(target=0.6, layout="per_layer"))
    search_(model)
    model.train()(**batch_for(model))
    with pytest.raises(RuntimeError, match="running_mean"):
        model.base_model.embedder.embedder.normalization(torch.zeros(2, 1, 4, 4))
    with pytest.raises(RuntimeError, match="running_mean"):
        model.base_model.encoder.stages[0].layers[0].layer[0].normalization(torch.zeros(2, 1, 4, 4))
    detach_(model)
    for path, before in norms_before.items():
        module = model.get_submodule(path)
        assert all(module._parameters[name] is parameter for name, parameter in before.items())
        assert "forward" not in module.__dict__


def test_behind_another_function_than_a_relu_masks_are_on_what_reads_a_unit():
    bound = bind(RESNET, tiny(ResNetForImageClassification, hidden_act="gelu"))
    assert not bound.spec.masked_batch_norms
    assert [*masked_batch_norms(bound, "mid0")] == []
    assert [row for _, row, _ in masked_batch_norms(bind(RESNET, tiny(ResNetForImageClassification)), "mid0")] == [0, 1]


@pytest.mark.parametrize(
    ("cls", "options"), [(ResNetForImageClassification, {"hidden_act": "gelu"}), (ViTForImageClassification, {})]
)
def test_masks_on_the_weights_of_maps_do_what_masks_on_their_inputs_do(cls, options, monkeypatch):
    def by_inputs(module, gates, parts, axis, x):
        ((name, row, (before, _, after, *_)),) = parts
        mask = gates.log_masks[name][row].exp().repeat_interleave(after).repeat(before)
        return type(module).forward(module, x * mask.view(-1, *(1,) * (x.dim() - 1 - axis % x.dim())))

    monkeypatch.setattr(hooks, "FEWER", 0)  # so that small batches mask the weights too
    folded = []
    apply = hooks.MaskKernel.apply
    monkeypatch.setattr(hooks.MaskKernel, "apply", lambda *args: folded.append(args) or apply(*args))
    ours = after_a_step(cls, **options)
    assert len(folded) > 3
    monkeypatch.setattr(hooks, "masked_map_forward", by_inputs)
    assert_same_step(ours, after_a_step(cls, **options))


def test_frozen_weights_of_convolutions_are_not_masked_themselves():
    model = tiny(ResNetForImageClassification)
    attach_(model, DMSConfig(target=0.6, layout="per_layer", pipeline="p-"))
    freeze_(model)
    search_(model)
    model.train()(**batch_for(model), labels=torch.tensor([0, 2])).loss.backward()
    assert gates_of(model).prune_ratio.grad.abs().sum() > 0
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "dms_gates" not in name)


def test_every_linear_map_that_reads_a_dim_is_masked_once():
    bound = bind(LLAMA, tiny_llama())
    mlp, kv = (Span(1, 20, 1), Span(1, 3, 8))
    assert list(masked_inputs(bound, "mlp")) == [(f"model.layers.{i}.mlp.down_proj", i, mlp) for i in range(3)]
    assert list(masked_inputs(bound, "kv")) == [(f"model.layers.{i}.self_attn.o_proj", i, kv) for i in range(3)]
    layers = [f"model.layers.{i}.{name}" for i in range(3) for name in ("input_layernorm", "post_attention_layernorm")]
    assert list(norms(bound, "hidden")) == [*layers, "model.norm"]


def test_training_runs_on_soft_masks_and_evaluation_on_hard_ones():
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.5, layout="per_layer"))
    search_(model)
    gates, inputs = gates_of(model), token_batch()
    model.train()
    soft = model(**inputs).logits
    masks = {name: torch.stack(rows).exp() for name, rows in gates.log_masks.items()}
    assert all(((mask > 0) & (mask < 1)).any() for mask in masks.values())
    model.eval()
    hard = model(**inputs).logits
    masks = {name: torch.stack(rows).exp() for name, rows in gates.log_masks.items()}
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks.values())
    assert all(torch.equal(mask.sum(-1).long(), gates.hard_units(name)) for name, mask in masks.items())
    assert not torch.allclose(soft, hard)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_gradients_of_the_masked_model_are_those_of_the_cut_one(layout):
    model = tiny_llama(dtype=torch.float64)
    attach_(model, DMSConfig(target=0.5, layout=layout, prune=("mlp", "layers")))
    search_(model, seed=1)
    gates, inputs = gates_of(model), token_batch()
    sizes = {name: gates.hard_units(name) for name in gates.dims}
    plan = make_plan(gates, sizes)
    pruned = cut(model, gates.attachment.bound, plan, layout)
    pruned(**inputs, labels=inputs["input_ids"]).loss.backward()
    with hard_masked(model, sizes):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    layer = int(plan.kept["layers"][0][0])
    found = model.model.layers[layer].mlp.down_proj.weight.grad
    expected = pruned.model.layers[0].mlp.down_proj.weight.grad
    kept = plan.kept["mlp"][layer]
    assert relative_difference(found[:, kept], expected) < 1e-5  # the stock norm computes in float32
    dropped = [unit for unit in range(20) if unit not in kept.tolist()]
    assert dropped
    assert found[:, dropped].abs().max() == 0


# ---- without a trace ----
@pytest.mark.parametrize("prune", [*[(dim,) for dim in DIMS], None])
def test_detach_leaves_no_trace(prune):
    model, inputs = tiny_llama(tie_word_embeddings=True), token_batch()
    before, logits = trace(model), model(**inputs).logits
    attach_(model, DMSConfig(target=0.8, prune=prune))
    search_(model)
    assert trace(model) != before
    model.train()
    model(**inputs).logits.sum().backward()
    model.zero_grad()
    model.eval()
    assert not torch.allclose(model(**inputs).logits, logits)
    detach_(model)
    assert trace(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_attach_renames_nothing():
    model = tiny_llama()
    parameters, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    attach_(model, DMSConfig(target=0.5))
    assert [name for name, _ in model.named_parameters()] == [*parameters, "dms_gates.prune_ratio"]
    assert list(model.state_dict()) == keys


def test_detach_and_gates_of_need_gates():
    model = tiny_llama()
    assert not has_gates(model)
    for function in (detach_, gates_of):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM has no gates. Put them on with hf_dms.attach_"):
            function(model)


def test_a_deep_copy_has_gates_of_its_own():
    model, inputs = tiny_llama(), token_batch()
    attach_(model, DMSConfig(target=0.5))
    search_(model)
    model.train()
    model(**inputs).logits.sum().backward()  # leaves masks and Taylor terms, as in the middle of a step
    twin = copy.deepcopy(model)
    gates, twins = gates_of(model), gates_of(twin)
    assert twins is not gates
    assert twins.prune_ratio is not gates.prune_ratio
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    before = model.eval()(**inputs).logits
    search_(twin, seed=5)
    assert not torch.allclose(twin.eval()(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)
    for each in (gates, twins):
        each.update_importance_()
    assert not torch.equal(gates.importance("mlp"), twins.importance("mlp"))
    detach_(twin)
    assert torch.equal(model(**inputs).logits, before)
    detach_(model)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)


# ---- memory and checkpointing ----
def step(model, inputs):
    """Loss, gradients and importance of one training step."""
    model.train()
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    gates = gates_of(model)
    gates.update_importance_()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, grads, {name: gates.raw_importance(name).clone() for name in gates.dims}


@pytest.mark.parametrize("warmup_steps", [0, 8])
def test_gradient_checkpointing_changes_nothing(warmup_steps):
    results = []
    for checkpointing in (False, True):
        model = tiny_llama(dtype=torch.float64)
        if checkpointing:
            model.activation_checkpointing_enable()
        attach_(model, DMSConfig(target=0.5, layout="per_layer", warmup_steps=warmup_steps))
        search_(model)
        gates_of(model).num_updates = 0
        results.append(step(model, token_batch()))
    (loss, grads, importance), (other_loss, other_grads, other_importance) = results
    assert torch.equal(loss, other_loss)
    assert warmup_steps or grads["dms_gates.prune_ratio"].abs().min() > 0
    for name, grad in grads.items():
        assert (grad is None) == (other_grads[name] is None)
        assert grad is None or torch.equal(grad, other_grads[name])
    assert all(torch.equal(values, other_importance[name]) for name, values in importance.items())


def saved_bytes(model, inputs):
    """Bytes of distinct storages that are saved for the backward pass, without those of parameters."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("prune", [*[(dim,) for dim in DIMS], None])
def test_gates_keep_no_second_copy_of_activations(prune):
    """If weights train, the next matmul saves y anyway. One more copy of the MLP's activations would be 9 % here."""
    sizes = dict(hidden_size=48, intermediate_size=128, num_hidden_layers=3)
    inputs = token_batch(4, 32)
    plain, gated = tiny_llama(**sizes).train(), tiny_llama(**sizes)
    attach_(gated, DMSConfig(target=0.95, layout="per_layer", prune=prune))
    search_(gated)
    assert saved_bytes(gated.train(), inputs) <= 1.04 * saved_bytes(plain, inputs)


# ---- what cannot be served ----
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prune=("heads",)), "dms.prune: llama has no dim 'heads'. Its dims are kv, mlp, hidden, layers"),
        (dict(round_to={"ffn": 2}), "dms.round_to: llama has no dim 'ffn'"),
        (dict(protect={"dims": ["rep"]}), "dms.protect.dims: llama has no dim 'rep'"),
        (dict(protect={"min": {"d": 2}}), "dms.protect.min: llama has no dim 'd'"),
        (dict(protect={"max": {"vocab": 2}}), "dms.protect.max: llama has no dim 'vocab'"),
        (dict(prune=("mlp",), protect={"dims": ["mlp"]}), "Nothing is left to prune"),
        (dict(layout="per_layer", protect={"layers": [3]}), "dms.protect.layers: the model has layers 0 to 2, got 3"),
        (dict(layout="per_layer", protect={"layers": [-4]}), "the model has layers 0 to 2, got -4"),
        (dict(layout="per_layer", protect={"layers": ["1"]}), "the model has layers 0 to 2, got '1'"),
        (dict(protect={"layers": [0]}), "dms.protect.layers with layout uniform: .* Use layout: per_layer"),
        (dict(protect={"min": {"mlp": 21}}), "sizes of mlp must lie in 1 to 20.* got min 21, max 20"),
        (dict(protect={"min": {"mlp": 0}}), "sizes of mlp must lie in 1 to 20.* got min 0, max 20"),
        (dict(protect={"min": {"mlp": 9}, "max": {"mlp": 8}}), "got min 9, max 8"),
        (dict(round_to={"mlp": 21}), "dms.round_to.mlp = 21: no multiple of it lies between 1 and 20"),
        (
            dict(round_to={"mlp": 8}, protect={"min": {"mlp": 9}, "max": {"mlp": 15}}),
            "dms.round_to.mlp = 8: no multiple of it lies between 9 and 15",
        ),
        (dict(resource="macs"), "resource macs needs dms.sequence_length"),
        (
            dict(target=0.01),
            "dms.target = 0.01 cannot be reached: .* Raise the target to at least 0.[0-9]{4}, prune more",
        ),
    ],
)
def test_attach_refuses_requests_that_cannot_be(options, message):
    untouched(tiny_llama(), message, **options)


def test_a_masked_norm_is_told_from_a_forward_of_the_user():
    model, calls = tiny_llama(LlamaModel), []
    model.layers[0].mlp.forward = functools.partial(
        lambda call, x: calls.append(1) or call(x), model.layers[0].mlp.forward
    )
    attach_(model, DMSConfig(target=0.5))
    detach_(model)
    outputs_of(model, token_batch())
    assert calls == [1]
