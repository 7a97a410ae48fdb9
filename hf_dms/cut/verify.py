"""The check that two models give the same outputs: masked against cut, cut against reloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec, dim_size
from ..archs.inputs import num_token_ids
from ..archs.plain_view import adapted_layers, is_packed, plain_parameters
from ..archs.registry import dense_spec
from ..archs.restoring import HALF, evaluating, in_precision
from ..errors import VerificationError
from ..gating.attach import gates_of, has_gates
from ..gating.places import norms
from ..resource import Sizes
from .plan import Plan

# Largest |difference| of an output, relative to its largest magnitude, between a masked, a cut and a reloaded model.
# They compute the same sums in another order. In float64 the limit is set by norms that transformers computes in
# float32. Models in half precision are compared in float32; the tolerances of half precision are for models that cannot
# be upcast, see `can_be_upcast`.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@contextlib.contextmanager
def hard_masked(model: PreTrainedModel, sizes: Sizes) -> Iterator[None]:
    """Context: a model with gates runs in evaluation mode, on hard masks of exactly these sizes."""
    gates = gates_of(model)
    gates.rounded = sizes
    try:
        with evaluating(model):
            yield
    finally:
        gates.rounded = None


@contextlib.contextmanager
def open_gates(model: PreTrainedModel) -> Iterator[None]:
    """Context: a model runs in evaluation mode as if it had no gates. Its layers can also be called one by one."""
    if not has_gates(model):
        yield
        return
    gates = gates_of(model)
    scales, gates.scales = gates.scales, {}
    try:
        # "All units" as sizes: the masks are 1, whatever the importance says.
        with hard_masked(model, {name: torch.full((dim.rows,), dim.units) for name, dim in gates.dims.items()}):
            # Usually the model's own hook computes masks; a layer that is called alone has no such hook.
            gates.compute_masks_()
            yield
    finally:
        gates.scales = scales


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs for one forward pass of any supported model: transformers' own tokens, or a random image."""
    if model.main_input_name == "pixel_values":
        spec = dense_spec(model.config.model_type)
        shape = [dim_size(spec.dim(name), model.config) for name in spec.image.split()]
        pixels = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    inputs = {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items()}
    if "input_ids" in inputs:
        known: Any = num_token_ids(model.config)
        # The dummy tokens are fixed numbers, and a small model may know fewer.
        inputs["input_ids"] = inputs["input_ids"] % known
    return inputs


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a model, or the last hidden state if it has no head."""
    outputs = all_outputs_of(model, inputs)
    return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))


@torch.no_grad()
def all_outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that a model returns, by name: logits, hidden states, a pooler's output, a backbone's feature maps.

    Args:
        model: the model.
        inputs: keyword arguments of a forward pass; labels are left out.
    """
    batch = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}
    batch = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    output = model(**batch)
    named = dict(output) if isinstance(output, Mapping) else {str(i): value for i, value in enumerate(output)}
    # A backbone returns a tuple of them, in the order of the stages that its config names.
    if (maps := named.get("feature_maps")) is not None:
        stages: Any = model.out_features
        named |= {f"feature_maps.{stage}": value for stage, value in zip(stages, maps, strict=True)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def output_units(bound: BoundSpec, plan: Plan) -> dict[str, tuple[int, Tensor]]:
    """For each output that holds prunable units: the axis of the units, and which of them stay.

    A base model returns its residual stream, so the dense model's outputs are wider than the cut model's. The
    description lists further such outputs.
    """
    # The stream that the model returns is the first one that norms read; networks with stages name theirs in `outputs`.
    streams = [name for name in plan.kept if list(norms(bound, name))]
    dims = dict.fromkeys(("last_hidden_state", "pooler_output"), *streams[:1]) | bound.spec.outputs
    axes = {name: axes.split() for name, axes in dims.items() if axes}
    return {
        name: (place - len(last), plan.kept[dim][0])
        for name, last in axes.items()
        for place, dim in enumerate(last)
        if dim in plan.kept
    }


def can_be_upcast(model: PreTrainedModel) -> bool:
    """Whether a model in half precision and its cut can be compared in float32.

    That does not work if the cut rounds weights (merged adapters, unpacked weights, weights of another precision than
    the rest), or if the attention implementation takes half precision only.
    """
    plain = not any(map(is_packed, model.modules())) and not list(adapted_layers(model))
    same = {tensor.dtype for _, tensor, _ in plain_parameters(model) if tensor.is_floating_point()} == {model.dtype}
    return plain and same and "flash" not in str(model.config._attn_implementation)


def check_same(
    model: PreTrainedModel,
    other: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    names: tuple[str, str],
    units: Mapping[str, tuple[int, Tensor]] | None = None,
) -> float:
    """Compare all outputs of two models in evaluation mode on one batch.

    Models in half precision are compared in float32. If outputs differ in float32, float64 decides.

    Args:
        model: the first model.
        other: the second model.
        inputs: keyword arguments of a forward pass.
        names: names of the two models for an error.
        units: by the name of an output, an axis of the first model's output and the positions on it that the second
            model has. Default: all positions.

    Returns:
        The largest |difference|, relative to the largest magnitude of the output.

    Raises:
        VerificationError: an output differs by more than `TOLERANCE`, is not a number, or is missing.
    """
    plain = can_be_upcast(model) and can_be_upcast(other)
    dtype = torch.float32 if model.dtype in HALF and plain else model.dtype
    try:
        return _largest_difference(model, other, inputs, names, units or {}, dtype)
    except VerificationError:
        # In a model that a hard cut has ruined, large terms cancel, and float32 shows the order of its sums.
        if dtype != torch.float32 or not plain or model.device.type == "mps":  # which has no float64
            raise
        with contextlib.suppress(VerificationError):
            return _largest_difference(model, other, inputs, names, units or {}, torch.float64)
        raise


def _largest_difference(
    model: PreTrainedModel,
    other: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    names: tuple[str, str],
    units: Mapping[str, tuple[int, Tensor]],
    dtype: torch.dtype,
) -> float:
    """`check_same` in one precision, at least that of the models."""
    expected, found = (_proof_outputs(each, inputs, dtype) for each in (model, other))
    for name, (axis, kept) in units.items():
        if name in expected:
            expected[name] = expected[name].index_select(axis, kept.to(expected[name].device))
    # The names of both: an output that only one of them returns is a difference.
    return max(_difference(name, expected, found, names, dtype) for name in expected | found)


def _proof_outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    with evaluating(model), in_precision(model, dtype) if dtype != model.dtype else contextlib.nullcontext():
        return all_outputs_of(model, inputs)


def _difference(
    name: str, expected: dict[str, Tensor], found: dict[str, Tensor], names: tuple[str, str], dtype: torch.dtype
) -> float:
    """Largest |difference| of one output, relative to its largest magnitude."""
    failure = f"The {names[1]} model does not compute what the {names[0]} model does: {name}"
    report = "Nothing was saved. Please report this with the model's config."
    shapes = [tuple(outputs[name].shape) if name in outputs else "missing" for outputs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"{failure} is {shapes[0]}, expected {shapes[1]}. {report}")
    mine, other = expected[name].double(), found[name].double().to(expected[name].device)
    # Relative to the largest number, not each to itself: where large terms cancel to a small one, their rounding stays.
    difference = float((mine - other).abs().max() / mine.abs().max().clamp(min=1e-30)) if mine.numel() else 0.0
    tolerance = TOLERANCE[dtype]
    # Not `>`: a comparison with NaN is false, and NaN must fail.
    if not difference <= tolerance:
        raise VerificationError(
            f"{failure} has relative difference {difference:.2e}, tolerance {tolerance:.0e} for {dtype}. {report}"
        )
    return difference
