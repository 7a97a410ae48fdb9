"""Repair of networks in stages: its equations, what it does not change, and the gain on unseen images."""

import pytest
import torch
from helpers.laws import batch_for, searched, tiny
from helpers.marks import ordinary_if, slow
from helpers.refit import bound_of, cut_by, images
from helpers.tiny import relative_difference
from torch import nn
from transformers import (
    ConvNextForImageClassification,
    ConvNextV2ForImageClassification,
    MobileViTForImageClassification,
    RegNetForImageClassification,
    ResNetForImageClassification,
    ResNetModel,
    SwinForImageClassification,
)

from hf_dms import HfDmsError, estimate_batch_norms_, prune, repair_
from hf_dms.cut.plan import Plan
from hf_dms.refit.batch_norms import batch_norms, estimate_inner_norms_, taking_statistics
from hf_dms.refit.interpolate import Interpolation
from hf_dms.refit.layerwise import LayerWalk
from hf_dms.refit.stream import unfolded
from hf_dms.refit.writes import find_stream_modules

MODELS = {
    "basic": (ResNetForImageClassification, {"layer_type": "basic"}),
    "basic, stem of the first stage": (ResNetForImageClassification, {"layer_type": "basic", "embedding_size": 8}),
    "bottleneck": (ResNetForImageClassification, {}),
    "bottleneck, strides first": (ResNetForImageClassification, {"downsample_in_bottleneck": True}),
    "regnet": (RegNetForImageClassification, {}),
    "regnet, x": (RegNetForImageClassification, {"layer_type": "x"}),
    "convnext": (ConvNextForImageClassification, {}),
    "convnext without scales": (ConvNextForImageClassification, {"layer_scale_init_value": 0.0}),
    "convnext of one stage": (ConvNextForImageClassification, dict(num_stages=1, hidden_sizes=[6], depths=[3])),
    "convnextv2": (ConvNextV2ForImageClassification, {}),
    "swin": (SwinForImageClassification, {}),
    "mobilevit": (MobileViTForImageClassification, {}),
    "swin, padded": (SwinForImageClassification, dict(window_size=3, depths=[2, 2], num_heads=[2, 4])),
}
INNER = ("mid", "reduced", "mlp", "groups", "squeeze", "heads")
PLANS = {"inner widths": INNER, "layers": ("layers",), "streams": ("hidden",), "all": (*INNER, "hidden", "layers")}


def model_of(name, **options):
    cls, own = MODELS[name]
    return tiny(cls, **own, **options)


def trained(name):
    """A model after a few steps on small images whose classes are shifts. Its running statistics are theirs."""
    model = model_of(name)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model.train()
    for step, batch in enumerate(images(model, 7, batches=4)):
        loss = model(batch["pixel_values"] + step, labels=torch.full((6,), step % 3)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    estimate_batch_norms_(model, images(model, 7))
    return model.eval()


def plan_for(model, families, share=0.6):
    """A plan that keeps this share of the units of every dim of these families. Each layer keeps other units."""
    bound, kept = bound_of(model), {}
    generator = torch.Generator().manual_seed(0)
    for name in bound.prunable:
        size, family = bound.sizes[name], name.rstrip("0123456789")
        if family not in families:
            continue
        if name in bound.stacks:
            kept[name] = (torch.tensor([0, *range(2, size)]),)
        else:
            count = max(1, int(share * size))
            rows = [torch.randperm(size, generator=generator)[:count] for _ in range(bound.rows(name))]
            kept[name] = tuple(row.sort().values for row in rows)
    return Plan(kept)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, state):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}


@torch.no_grad()
def writers_of(model, dense):
    """The maps that write into a stream: (name of the layer, path in it, map)."""
    bound, found = bound_of(dense), []
    walk = LayerWalk(model, bound, images(model, 1, batches=1))
    for layer, (stack, number) in enumerate(walk.places):
        paths = find_stream_modules(walk, layer).writes
        found += [(f"{bound.stacks[stack]}.{number}", path, walk.layers[layer].get_submodule(path)) for path in paths]
        walk.advance(layer)
    return found


@torch.no_grad()
def streams(model, dense, batches):
    """The stream behind each layer, `[positions, units]`."""
    walk, found = LayerWalk(model, bound_of(dense), batches), []
    for layer in range(len(walk.layers)):
        places = find_stream_modules(walk, layer)
        runs = [walk.run(layer, batch, places) for batch in range(len(batches))]
        found.append(torch.cat([run.before_end.flatten(0, -2) for run in runs]))
        walk.advance(layer)
    return found


# ---- where layers write ----
def test_writes_of_a_resnet_are_the_last_convolution_of_a_block_and_the_shortcut_where_it_has_one():
    model = model_of("bottleneck")
    walk, found = LayerWalk(model, bound_of(model), images(model, 1, batches=1)), []
    with torch.no_grad():
        for layer in range(len(walk.layers)):
            found.append(find_stream_modules(walk, layer))
            walk.advance(layer)
    last, shortcut = "layer.2.convolution", "shortcut.convolution"
    assert [places.writes for places in found[:3]] == [(last, shortcut), (last,), (last, shortcut)]
    assert [places.fresh for places in found] == [True, False, True, False, False, True]
    assert found[0].behind == {last: "layer.2.normalization", shortcut: "shortcut.normalization"}
    assert {places.ending for places in found} == {"activation"}


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_through_all_stages_computes_what_the_model_computes(name):
    model = model_of(name)
    batch = batch_for(model)
    walk = LayerWalk(model, bound_of(model), [batch])
    with torch.no_grad():
        for layer in range(len(walk.layers)):
            walk.advance(layer)
        last = {"swin": "layernorm", "mobilevit": "encoder.layer.4.layernorm"}.get(name.partition(",")[0])
        if last is None:
            expected = model.base_model(**batch).last_hidden_state
        else:  # another module reads what the last layer wrote
            expected, _ = captured(model.base_model, last, [batch])
        assert torch.equal(walk.hidden[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=1),
        dict(kernel_size=1, stride=2),
        dict(kernel_size=1, padding=1),
        dict(kernel_size=3, padding=1, stride=2),
        dict(kernel_size=(3, 2), padding=(0, 1), dilation=(2, 1)),
    ],
)
def test_a_convolution_is_a_linear_map_of_its_unfolded_inputs(options):
    convolution = nn.Conv2d(3, 4, **options)
    inputs = torch.randn(2, 3, 9, 8)
    found = unfolded(convolution, inputs) @ convolution.weight.flatten(1).T + convolution.bias
    torch.testing.assert_close(found, convolution(inputs).movedim(1, -1))


# ---- what is solved ----
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_that_changes_nothing_is_left_as_it_is(name):
    model = model_of(name)
    pruned = cut_by(model, Plan({}))
    before = state_of(pruned)
    repair_(pruned, model, Plan({}), images(model, 1, batches=4))
    assert not changed(pruned, before)


@pytest.mark.parametrize("name", MODELS)
def test_with_all_units_kept_and_enough_positions_the_model_is_restored(name):
    model = model_of(name, dtype=torch.float64)
    batches, held_out = list(images(model, 1, batches=6)), batch_for(model)
    with torch.no_grad():
        walk = LayerWalk(model, bound_of(model), batches)
        for layer in range(len(walk.layers)):  # its batch norms have the statistics of these images
            estimate_inner_norms_(walk, find_stream_modules(walk, layer), layer)
            walk.advance(layer)
        pruned = cut_by(model, Plan({}))
        for _, _, module in writers_of(pruned, model):
            generator = torch.Generator().manual_seed(0)
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    repair_(pruned, model, Plan({}), batches, ridge=1e-13)
    assert relative_difference(pruned(**held_out).logits, model(**held_out).logits) < 1e-3
    for (_, _, module), (_, _, expected) in zip(writers_of(pruned, model), writers_of(model, model)):
        if name.startswith("convnext"):  # behind a ReLU some inputs are always 0
            assert relative_difference(module.weight, expected.weight) < 1e-3


def captured(model, path, batches):
    """Inputs and outputs of a module in forward passes of the whole model, in evaluation mode."""
    found = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, output: found.append((args[0], output)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return [torch.cat(tensors) for tensors in zip(*found)]


@pytest.mark.parametrize("name", ["basic", "bottleneck", "convnext"])
def test_a_map_gets_the_ridge_regression_of_what_the_stream_lacks(name):
    """The repair of the second layer of the second stage. Only this layer has lost units."""
    model = model_of(name, dtype=torch.float64, depths=[1, 2, 1])
    dim = "mlp1" if name == "convnext" else "mid1"
    size = bound_of(model).sizes[dim]
    plan = Plan({dim: (torch.arange(size), torch.arange(0, size, 2))})
    pruned = cut_by(model, plan)
    batches, ridge = list(images(model, 1, batches=3)), 0.05
    layer, path, module = next(found for found in writers_of(pruned, model) if found[0].endswith("stages.1.layers.1"))
    block = pruned.get_submodule(layer)
    inner = [norm for norm in batch_norms(block) if norm is not batch_norms(block)[-1]]
    with torch.no_grad(), taking_statistics(inner):  # norms in front of the map have the cut model's statistics
        for batch in batches:
            pruned(**batch)
    inputs, _ = captured(pruned, f"{layer}.{path}", batches)
    if name == "convnext":
        channels = block.layer_scale_parameter
        stream, dense = (captured(m, layer, batches)[1].movedim(1, -1).flatten(0, -2) for m in (pruned, model))
        columns = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1).flatten(0, -2)
    else:  # a convolution per weight, before the block's last ReLU
        norm = block.layer[-1].normalization
        channels = norm.weight / (norm.running_var + norm.eps).sqrt()
        ending = f"{layer}.activation"
        stream, dense = (captured(m, ending, batches)[0].movedim(1, -1).flatten(0, -2) for m in (pruned, model))
        count = module.weight[0].numel()
        kernels = torch.eye(count).double().view(count, *module.weight.shape[1:])
        columns = nn.functional.conv2d(inputs, kernels, None, module.stride, module.padding)
        columns = columns.movedim(1, -1).flatten(0, -2)
    weights = 1 / dense.square().mean(1, keepdim=True) if name == "convnext" else 1  # no norm reads a ResNet's
    width = module.weight[0].numel()
    gram = columns.T @ (weights * columns)
    gram += ridge * gram.diagonal()[:width].mean() * torch.eye(len(gram)).double()
    change = torch.linalg.solve(gram, columns.T @ (weights * (dense - stream) / channels)).T
    before, weight = state_of(pruned), module.weight.clone()
    repair_(pruned, model, plan, batches, ridge=ridge)
    assert relative_difference(module.weight - weight, change[:, :width].view_as(weight)) < 1e-6
    until = [key for key in before if key.startswith(layer)][-1]
    early = list(before)[: list(before).index(until) + 1]
    behind = path.replace("convolution", "normalization")
    ours = {key for key in early if key.startswith((f"{layer}.{path}.", f"{layer}.{behind}."))}
    assert changed(pruned, before) & {*early} == ours


@pytest.mark.parametrize("name", ["basic", "bottleneck", "convnext"])
def test_only_maps_that_write_into_a_stream_or_read_one_change_and_batch_norms(name):
    model = model_of(name)
    dense, plan = state_of(model), plan_for(model, PLANS["all"], 0.75)
    pruned = cut_by(model, plan)
    before = state_of(pruned)
    allowed = {f"{layer}.{path}" for layer, path, _ in writers_of(pruned, model)}
    repair_(pruned, model, plan, images(model, 1, batches=4))
    norms = [*batch_norms(pruned)][1:]  # the norms of all blocks, without that of the stem
    allowed |= {name for name, module in pruned.named_modules() if module in norms}
    if name == "convnext":  # a ResNet's blocks read their stream by convolutions
        allowed |= {name for name, _ in pruned.named_modules() if name.endswith("pwconv1")}
    assert {key.rpartition(".")[0] for key in changed(pruned, before)} == allowed
    assert not changed(model, dense)
    for module in [*model.modules(), *pruned.modules()]:
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_running_statistics_are_those_of_the_repaired_model(layer_type):
    model = model_of(layer_type)
    plan = plan_for(model, INNER)
    pruned = cut_by(model, plan)
    batches = list(images(model, 1, batches=4))
    repair_(pruned, model, plan, batches)
    for name, norm in pruned.named_modules():
        if norm not in batch_norms(pruned)[1:]:
            continue
        if layer_type == "bottleneck" and ".layer.1." in name:
            continue  # when it was measured, the norm in front of it used each batch's own statistics
        inputs = [captured(pruned, name, [batch])[0] for batch in batches]
        mean = torch.stack([batch.mean((0, 2, 3)) for batch in inputs]).mean(0)
        variance = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in inputs]).mean(0)
        assert relative_difference(norm.running_mean, mean) < 1e-4
        assert relative_difference(norm.running_var, variance) < 1e-4


def test_a_share_of_a_repair_is_one_of_its_statistics_too():
    model = model_of("basic")
    plan = plan_for(model, INNER)
    pruned = cut_by(model, plan)
    before, kept = state_of(pruned), Interpolation(pruned)
    repair_(pruned, model, plan, images(model, 1, batches=2))
    with torch.no_grad():
        kept._move_([(tensor, kept._before[name], tensor.clone()) for name, tensor in kept._named()], 0.0)
    assert {name.rpartition(".")[2] for name in changed(pruned, before)} == {"num_batches_tracked"}


def test_images_that_fill_one_window_and_others_that_fill_several_are_not_repaired_on_together():
    model = tiny(SwinForImageClassification, depths=[2], num_heads=[2], image_size=4)
    plan = Plan({"mlp0": (torch.arange(4), torch.arange(4))})
    small = next(images(model, 1))
    model.config.image_size = 8
    with pytest.raises(HfDmsError, match=r"what attention.o_proj writes is added to the residual stream in another w"):
        repair_(cut_by(model, plan), model, plan, [small, next(images(model, 1))])


# ---- that it helps ----
STREAMED = ("basic", "bottleneck", "regnet", "convnext", "convnextv2", "swin", "mobilevit")
CASES = [(name, plan) for name in STREAMED for plan in PLANS]


@pytest.mark.parametrize(
    ("name", "plan"),
    ordinary_if(lambda name, plan: (CASES.index((name, plan)) // len(PLANS) + list(PLANS).index(plan)) % 2 == 0, CASES),
)
def test_streams_of_trained_networks_come_closer_on_held_out_images(name, plan):
    model = trained(name)
    plan = plan_for(model, PLANS[plan], 0.75)
    pruned, bound = cut_by(model, plan), bound_of(model)
    held_out = list(images(model, 2, batches=4))
    expected = streams(model, model, held_out)
    stacks = [(stack, layer) for stack in bound.stacks for layer in range(bound.sizes[stack])]
    kept = [(name, layer) for name, layer in stacks if name not in plan.kept or layer in plan.kept[name][0].tolist()]
    ends = dict(kept)  # the last layer of each stage

    def errors():
        """The relative error of each stage's last stream: per position where a norm reads the stream."""
        found = streams(pruned, model, held_out)
        for stack, last in ends.items():
            hidden = "hidden" + stack.removeprefix("layers")
            units = plan.kept.get(hidden, (slice(None),))[0]
            aim = expected[max(i for i, place in enumerate(stacks) if place[0] == stack)][:, units]
            size, normed = aim.square(), name.startswith(("convnext", "swin", "mobilevit"))
            weights = 1 / (size.mean(1, keepdim=True) if normed else size.mean())
            yield float(((found[kept.index((stack, last))] - aim).square() * weights).mean())

    before = list(errors())
    repair_(pruned, model, plan, images(model, 1, batches=12))
    after = list(errors())
    assert all(new < old for new, old in zip(after, before)), (before, after)
    assert after[-1] < 0.9 * before[-1]


@pytest.mark.parametrize("name", slow("convnext", "basic"))
def test_maps_of_a_block_that_learn_together_bring_it_closer_still(name):
    """Measured on the batches of the repair. One in four is held out for each block, not for the blocks behind."""
    model = trained(name)
    plan, batches = plan_for(model, INNER), list(images(model, 1, batches=24))
    expected = streams(model, model, batches)[-1]

    def error(epochs):
        pruned = cut_by(model, plan)
        repair_(pruned, model, plan, batches, epochs=epochs)
        return float((streams(pruned, model, batches)[-1] - expected).square().mean())

    assert error(4) < error(0)


def test_what_waits_between_layers_may_wait_in_files(tmp_path):
    model = model_of("convnext")
    plan = plan_for(model, PLANS["all"])
    pruned, other = cut_by(model, plan), cut_by(model, plan)
    told = []
    repair_(pruned, model, plan, images(model, 1, batches=3))
    repair_(other, model, plan, images(model, 1, batches=3), offload=tmp_path, progress=lambda *now: told.append(now))
    assert not changed(other, pruned.state_dict())
    assert not any(tmp_path.iterdir())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_with_gates_on_the_dense_model_their_plan_is_repaired():
    model = model_of("bottleneck")
    searched(model, layout="per_layer")
    pruned = prune(model, inputs=batch_for(model))
    before = state_of(pruned)
    repair_(pruned, model, None, images(model, 1, batches=4))
    assert any("convolution" in key for key in changed(pruned, before))


# ---- errors ----
def test_what_cannot_be_repaired_is_an_error():
    model = model_of("basic")
    plan = plan_for(model, PLANS["all"])
    pruned = cut_by(model, plan)
    message = r"has 2 layers and a residual stream of 7; the plan keeps 3 layers, .* has 3 and 12 \(layers1\)\. Give"
    with pytest.raises(ValueError, match=message):
        repair_(pruned, model, Plan({name: plan.kept[name] for name in ("layers0", "hidden0")}), images(model, 1))
    pruned.base_model.encoder.stages[1].layers[1].layer[0].convolution.weight.data[0] = torch.inf
    with pytest.raises(
        ValueError, match=r"of layer.1.convolution of layer 2 of layers1 have no finite solution at rid"
    ):
        repair_(pruned, model, plan, images(model, 1, batches=2))


def test_a_block_that_adds_in_another_way_is_an_error():
    model = tiny(ResNetModel)
    block = model.encoder.stages[1].layers[1]
    block.activation.register_forward_hook(lambda module, args, output: output * 2 + args[0])
    block.layer.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(ValueError, match=r"what layer.2.convolution of a resnet layer write is not added to the resid"):
        repair_(cut_by(model, Plan({})), model, Plan({}), images(model, 1, batches=2))
