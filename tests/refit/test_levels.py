"""Maps refitted at every width, and the walk that refits them one after the other."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import (
    batches_for,
    bound_of,
    captured,
    cut_by,
    labelled_batches,
    layers_of,
    weights_of_positions,
)
from helpers.tiny import relative_difference
from transformers import (
    BeitForImageClassification,
    BertForMaskedLM,
    Dinov2ForImageClassification,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    ViTForImageClassification,
)

from hf_dms.cut.plan import Plan
from hf_dms.refit.curvature import Sums, Writer, position_weights, stream_factors, with_bias
from hf_dms.refit.levels import RefittedMap, sweep
from hf_dms.refit.one_shot import factors_of

CLASSES = (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    ViTForImageClassification,
)
RIDGES = (0.01, 0.1)


def attention_dim(model):
    return next(dim.name for dim in bound_of(model).spec.dims if dim.scope == "layer" and dim.name != "mlp")


def dims_of(model):
    return (attention_dim(model), "mlp")


def map_of(inputs=12, outputs=5, bias=True, size=1, seed=0, **options):
    """A refitted map on random data, and the data."""
    torch.manual_seed(seed)
    module = torch.nn.Linear(inputs, outputs, bias=bias).double()
    a, missing = torch.randn(50, inputs).double(), torch.randn(50, outputs).double()
    sums = Sums.of(module)
    sums.add_(a[:20], missing[:20])
    sums.add_(a[20:], missing[20:])
    writer = Writer("map", "mlp", torch.arange(inputs).view(-1, size))
    return RefittedMap(module, writer, sums, None, RIDGES, **options), module, a, missing


# ---- one map ----
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_every_width_is_the_ridge_regression_on_its_units(bias, size):
    refitted, module, a, missing = map_of(bias=bias, size=size)
    strength = RIDGES[1] * a.square().mean()
    for width in range(1, 12 // size + 1):
        columns = [
            c for unit in refitted.elimination.order[:width].tolist() for c in range(unit * size, (unit + 1) * size)
        ]
        rows, wanted = a[:, columns], module(a) + missing
        prior = module.weight.T[columns]
        if bias:
            rows, prior = torch.cat([torch.ones(50, 1).double(), rows], 1), torch.cat([module.bias[None], prior])
        left = rows.T @ rows / 50 + strength * torch.eye(rows.shape[1])
        expected = torch.linalg.solve(left, rows.T @ wanted / 50 + strength * prior)
        assert relative_difference(refitted.weight(width), expected.T) < 1e-5
        assert relative_difference(refitted.apply(a, width), rows @ expected) < 1e-5


def test_between_two_levels_the_output_goes_straight_and_its_slope_is_the_ratio_s_gradient():
    refitted, _, a, _ = map_of(levels=4)
    assert refitted.widths == [1, 3, 6, 9, 12]
    width = torch.tensor(7.0, requires_grad=True)
    output = refitted.apply(a, width)
    low, high = refitted.apply(a, 6), refitted.apply(a, 9)
    assert relative_difference(output, low + (high - low) / 3) < 1e-5
    output.sum().backward()
    assert float(width.grad) == pytest.approx(float((high - low).detach().sum()) / 3, rel=1e-4)


def test_sums_of_parts_are_the_sums_of_the_whole():
    _, module, a, missing = map_of()
    parts, whole = [Sums.of(module), Sums.of(module)], Sums.of(module)
    for number, rows in enumerate(torch.arange(50).split(7)):
        parts[number % 2].add_(a[rows], missing[rows])
    whole.add_(a, missing)
    total = parts[0] + parts[1]
    for name in ("gram", "moment", "missing", "total"):
        assert torch.allclose(getattr(total, name), getattr(whole, name), rtol=1e-12)
    assert total.total == 50


def test_a_position_of_weight_two_counts_as_two():
    _, module, a, missing = map_of()
    weighted, repeated = Sums.of(module), Sums.of(module)
    weighted.add_(a, missing, torch.arange(50).double() % 3)
    places = torch.arange(50).repeat_interleave(torch.arange(50) % 3)
    repeated.add_(a[places], missing[places])
    for name in ("gram", "moment", "missing", "total"):
        assert torch.allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-12)


def test_errors_count_relative_to_the_stream_of_a_position():
    stream = torch.tensor([[3.0, -3.0], [300.0, -300.0], [0.0, 0.0]])
    weights = position_weights(stream)
    assert torch.allclose(weights * stream.square().mean(1), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("width", [1.0, 6.0, 12.0])
def test_the_slope_is_there_at_a_level_and_at_both_ends(width):
    refitted, _, a, _ = map_of(levels=4)
    width = torch.tensor(width, requires_grad=True)
    output = refitted.apply(a, width)
    assert relative_difference(output, refitted.apply(a, int(width.detach()))) < 1e-5
    output.square().sum().backward()
    assert width.grad != 0


# ---- gradients behind the maps ----
@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM, ViTForImageClassification])
def test_a_factor_is_the_sum_of_outer_products_of_the_gradients_per_term_of_the_loss(cls):
    model = tiny(cls, dtype=torch.float64)
    model.lm_head.weight.requires_grad_(False) if cls is LlamaForCausalLM else None
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    bound, batches = bound_of(model), labelled_batches(model, batches=2)
    factors = factors_of(model, bound, batches)
    assert {layer for layer, _ in factors} == {0, 1, 2}
    key = max(factors)
    gradients, terms = [], 0

    def keep(_, args, output):
        output.register_hook(lambda gradient: gradients.append(gradient.flatten(0, 1)))

    hook = layers_of(model)[key[0]].get_submodule(key[1]).register_forward_hook(keep)
    for batch in batches:
        count = batch["labels"].numel()
        (model(**batch).loss * count).backward()
        terms += count
    hook.remove()
    rows = torch.cat(gradients)
    assert relative_difference(factors[key], rows.T @ rows / terms) < 1e-9
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_need_labels():
    model = tiny(LlamaForCausalLM)
    bound = bound_of(model)
    with pytest.raises(ValueError, match="needs batches with labels, got input_ids, attention_mask"):
        stream_factors(model, bound, ["mlp.down_proj"], batches_for(model))
    with pytest.raises(ValueError, match="needs at least one batch with labels, got none"):
        stream_factors(model, bound, ["mlp.down_proj"], [])


# ---- the walk ----
@pytest.mark.parametrize(
    "cls", [*CLASSES, GraniteForCausalLM, Gemma2ForCausalLM, Dinov2ForImageClassification, BeitForImageClassification]
)
def test_a_walk_that_cuts_nothing_finds_the_dense_weights(cls):
    model = tiny(cls)
    widths = {name: torch.full((3,), bound_of(model).sizes[name]) for name in dims_of(model)}
    maps = sweep(model, bound_of(model), batches_for(model), {}, widths)
    assert len(maps) == 6
    for (layer, path), refitted in maps.items():
        module = layers_of(model)[layer].get_submodule(path)
        found = refitted.weight(refitted.num_units)
        assert relative_difference(found, with_bias(module)[refitted.columns].T) < 1e-4


@pytest.mark.parametrize("cls", CLASSES)
def test_later_maps_see_the_activations_of_the_model_as_it_is_refitted_so_far(cls):
    """The last map of a walk equals the ridge regression in the model that is cut and refitted before it."""
    model = tiny(cls, dtype=torch.float64)
    bound, batches = bound_of(model), batches_for(model)
    weights = weights_of_positions(model, 2, batches)
    widths = {name: torch.tensor([2, 1, bound.sizes[name]]) for name in dims_of(model)}
    maps = sweep(model, bound, batches, {}, widths)
    kept = {
        name: tuple(
            next(m for (at, _), m in maps.items() if at == layer and m.dim == name)
            .elimination.order[: int(widths[name][layer])].sort().values
            for layer in range(3)
        )
        for name in dims_of(model)
    }  # fmt: skip
    pruned = cut_by(model, Plan(kept))
    for (layer, path), refitted in list(maps.items())[:-1]:
        module = layers_of(pruned)[layer].get_submodule(path)
        weight = refitted.weight(int(widths[refitted.dim][layer])).double()
        columns = refitted.columns[refitted.always :][: weight.shape[1] - refitted.always]
        module.weight.data = weight[:, refitted.always :][:, columns.argsort()]
        if module.bias is not None:
            module.bias.data = weight[:, 0]
    (layer, path), last = list(maps.items())[-1]
    inputs = captured(pruned, layers_of(pruned)[layer].get_submodule(path), batches)[0]
    if last.always:
        inputs = torch.cat([torch.ones_like(inputs[:, :1]), inputs], 1)
    inputs = inputs[:, [0] * last.always + [int(c) + last.always for c in last.columns[last.always :]]]
    inputs = inputs * (weights / weights.mean()).sqrt()
    ridge = 0.1 * inputs[:, last.always :].square().mean()
    gram = inputs.T @ inputs / len(inputs) + ridge * torch.eye(inputs.shape[1])
    assert relative_difference(last.factor.double() @ last.factor.double().T, gram) < 1e-5


def test_a_walk_leaves_the_model_as_it_was():
    model = tiny(LlamaForCausalLM)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sweep(model.train(), bound_of(model), batches_for(model), {}, {"mlp": torch.full((3,), 5)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


def test_activations_that_are_not_finite_are_an_error():
    model = tiny(LlamaForCausalLM)
    layers_of(model)[1].mlp.up_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"least squares of mlp.down_proj have no solution: its activations on these"):
        sweep(model, bound_of(model), batches_for(model), {}, {"mlp": torch.full((3,), 5)})
