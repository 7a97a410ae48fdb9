"""The proof that two models compute the same: masked against cut, cut against reloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec, dim_size
from ..archs.registry import ARCHS
from ..archs.restoring import evaluating
from ..errors import VerificationError
from ..gating.attach import gates_of, has_gates, norms
from ..resource import Sizes
from .plan import Plan

# Largest |difference| of outputs, relative to their largest magnitude, between a masked, a cut and a reloaded model:
# the same sums in another order. float64 is bounded by norms that transformers computes in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@contextlib.contextmanager
def hard_masked(model: PreTrainedModel, sizes: Sizes) -> Iterator[None]:
    """Run a model with gates in evaluation mode on hard masks of exactly these sizes for a while."""
    gates = gates_of(model)
    gates.rounded = sizes
    try:
        with evaluating(model):
            yield
    finally:
        gates.rounded = None


@contextlib.contextmanager
def open_gates(model: PreTrainedModel) -> Iterator[None]:
    """Run a model in evaluation mode as if it had no gates, for a while; parts of it can run by themselves."""
    if not has_gates(model):
        yield
        return
    gates = gates_of(model)
    with hard_masked(model, {name: torch.full((dim.rows,), dim.units) for name, dim in gates.dims.items()}):
        gates.compute_masks_()
        yield


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs for one forward pass of any supported model: transformers' own tokens, or a random image."""
    if model.main_input_name == "pixel_values":
        spec = ARCHS[model.config.model_type.removeprefix("dms_")]
        shape = [dim_size(spec.dim(name), model.config) for name in spec.image.split()]
        pixels = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    inputs = {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items()}
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"] % model.config.vocab_size
    return inputs


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a model, or the last hidden state if it has no head."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}
    output = model(**inputs)
    return output["logits"] if "logits" in output else output[0]


def output_units(model: PreTrainedModel, bound: BoundSpec, plan: Plan) -> Tensor | None:
    """Units of the last axis of a dense model's output that stay: without a head that is the residual stream."""
    streams = [rows[0] for name, rows in plan.kept.items() if list(norms(bound, name))]
    return streams[0] if streams and model.base_model is model else None


def check_same(
    model: PreTrainedModel,
    other: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    names: tuple[str, str],
    units: Tensor | None = None,
) -> float:
    """Compare the outputs of two models in evaluation mode on one batch.

    Args:
        model: the first one.
        other: the second one.
        inputs: keyword arguments of a forward pass.
        names: what to call them in an error.
        units: positions on the last axis of the first one's output that the second one has. Default: all.

    Returns:
        The largest |difference|, relative to the largest magnitude.

    Raises:
        VerificationError: it is above `TOLERANCE` for the model's dtype, or not a number.
    """
    with evaluating(model, other):
        expected, found = outputs_of(model, inputs).double(), outputs_of(other, inputs).double()
    if units is not None:
        expected = expected.index_select(-1, units.to(expected.device))
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
    tolerance = TOLERANCE[model.dtype]
    if not difference <= tolerance:
        raise VerificationError(
            f"The {names[1]} model does not compute what the {names[0]} model does: relative difference "
            f"{difference:.2e}, tolerance {tolerance:.0e} for {model.dtype}. Nothing was saved. "
            "Please report this with the model's config."
        )
    return difference
