"""Repair: least squares on the linear maps that write into the residual stream of a cut model, without training.

A cut leaves the remaining weights as they were. Layer after layer, each map that writes into the stream (`o_proj` and
`down_proj` of a Llama, found from the description) gets the weight that brings the stream closest to the dense model's.
With A `[tokens, inputs]` the map's inputs in the cut model, as repaired so far, and R `[tokens, hidden]` what the
stream lacks after it (the dense one minus the cut one, on the kept hidden units), its change is ridge regression:

    ΔWᵀ = (AᵀA + ridge·mean(diag AᵀA)·I)⁻¹ AᵀR

so a cut that changes nothing is left as it is. The last map of a layer aims past the dropped layers that follow; where
the stream itself is normalised (BERT) the layer takes over the norm of the last one dropped, which belongs to the sum
aimed at. A bias is one more input, always 1. Nothing else of the model moves.

Both models walk side by side, one layer at a time. Memory: the hidden states of all batches for both models and one
layer's targets; never the activations of all layers, never a second copy of a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..cut.plan import Plan, kept_units
from ..errors import HfDmsError
from ..gating.attach import has_gates
from .layerwise import Batches, Places, Walk, find_places, stream_dim


@torch.no_grad()
def repair_(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    ridge: float = 0.1,
) -> None:
    """Bring the residual stream of a cut model back to the dense one's, in place.

    Args:
        pruned: the cut model, on one device.
        dense: the model it was cut from, without gates; it is left as it was. After a search that trained the weights:
            the model before it, since with open masks the trained one is no model to aim at.
        plan: the units that were kept: `plan_of` the model while it had gates.
        batches: keyword arguments of forward passes; all are held at once. Positions where an `attention_mask`
            `[batch, tokens]` is 0 do not count; labels are left out.
        ridge: how strongly a weight is held back, relative to the mean square of its inputs.

    Raises:
        ValueError: no batches, a model with gates, a plan of another cut, activations that are not finite, or layers
            that do not write into the stream as a Llama's or a BERT's do. Layers before the one that an error is about
            are repaired by then.
    """
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    _check(pruned, dense, batches, ridge)
    bound = bind(spec_for(dense.config), dense)
    stream = stream_dim(bound)
    units = kept_units(plan, stream, None, bound.sizes[stream])
    kept_layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    with _evaluating(dense), _evaluating(pruned):
        teacher, student = Walk(dense, bound, batches), Walk(pruned, bound, batches)
        _check_plan(student, teacher, kept_layers, units)
        places = find_places(teacher, bound)
        for layer in range(kept_layers[0]):
            teacher.advance(layer)
        for position, layer in enumerate(kept_layers):
            end = kept_layers[position + 1] if position + 1 < len(kept_layers) else bound.num_layers
            targets = _targets(teacher, places, range(layer, end), units)
            for path in places.writes:
                target = [batch.pop(path).to(pruned.device) for batch in targets]
                gram, moment = _normal_equations(student, places, position, path, target, batches)
                _update_(student.layers[position].get_submodule(path), gram, moment, ridge, f"{path} of layer {layer}")
            if end > layer + 1:
                _take_over_norm_(student.layers[position], teacher.layers[end - 1], places, units)
            student.advance(position)


# ---- both models, layer by layer -------------------------------------------------------------------------------------
@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _targets(teacher: Walk, places: Places, layers: range, units: Tensor) -> list[dict[str, Tensor]]:
    """Let the dense model pass a kept layer and the dropped ones that follow it.

    Returns:
        Per batch and map, what the stream should be after it `[batch, tokens, kept hidden units]`: the dense one after
        the same map, for a layer's last map after the last one of these layers.
    """
    targets, units = [], units.to(teacher.hidden[0].device)
    for batch in range(len(teacher.hidden)):
        for layer in layers:
            recorder = teacher.run(layer, batch, places)
            teacher.hidden[batch] = recorder.output
            if layer == layers[0]:
                sums = recorder.sums
        sums |= {places.writes[-1]: recorder.sums[places.writes[-1]]}
        targets.append({path: tensor.index_select(-1, units) for path, tensor in sums.items()})
    return targets


def _take_over_norm_(kept: nn.Module, dropped: nn.Module, places: Places, units: Tensor) -> None:
    """Give a layer the norm behind another one's last write, if the stream passes it."""
    for path in places.norms[-1:]:
        for name, parameter in kept.get_submodule(path).named_parameters():
            source = dropped.get_submodule(path).get_parameter(name)
            parameter.copy_(source.index_select(0, units.to(source.device)))


# ---- least squares ---------------------------------------------------------------------------------------------------
def _normal_equations(
    student: Walk, places: Places, layer: int, path: str, targets: list[Tensor], batches: Batches
) -> tuple[Tensor, Tensor]:
    """AᵀA `[inputs, inputs]` and AᵀR `[inputs, hidden]` of a map, in float64: sums over all positions that count."""
    module: Any = student.layers[layer].get_submodule(path)
    width, hidden = module.in_features + (module.bias is not None), module.out_features
    gram = torch.zeros(width, width, dtype=torch.float64, device=module.weight.device)
    moment = torch.zeros(width, hidden, dtype=torch.float64, device=module.weight.device)
    for number, (target, batch) in enumerate(zip(targets, batches)):
        recorder = student.run(layer, number, places, until=path)
        counts = _positions(batch, target)
        wanted, found, inputs = (_wide(t[counts]) for t in (target, recorder.sums[path], recorder.inputs[path]))
        if module.bias is not None:
            inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
        gram += inputs.T @ inputs
        moment += inputs.T @ (wanted - found)
    return gram, moment


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: what a batch's sums are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positions(batch: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Which positions of a batch count, `[batch, tokens]` bool."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.to(hidden.device).bool()


def _update_(module: Any, gram: Tensor, moment: Tensor, ridge: float, name: str) -> None:
    """Add (AᵀA + ridge·mean(diag AᵀA)·I)⁻¹ AᵀR to a linear map; its bias is the last input, which the mean leaves out.

    Raises:
        ValueError: the sums are not finite, or not positive definite.
    """
    width = module.in_features
    damping = (ridge * gram.diagonal()[:width].mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve(moment, factor).T
    if failed or not change.isfinite().all():
        raise HfDmsError(
            f"repair: the least squares of {name} have no finite solution at ridge {ridge}. Raise it; if that does not "
            "help, the activations of the model on these batches are not finite: check the data, or use a wider dtype."
        )
    module.weight.copy_(module.weight.double() + change[:, :width])
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + change[:, width])


def _check(pruned: PreTrainedModel, dense: PreTrainedModel, batches: Batches, ridge: float) -> None:
    if not batches:
        raise HfDmsError("repair needs at least one batch, got none.")
    for batch in batches:
        if (mask := batch.get("attention_mask")) is not None and mask.dim() != 2:
            raise HfDmsError(
                f"repair: the attention_mask of a batch has shape {tuple(mask.shape)}, expected [batch, tokens]."
            )
    if not ridge > 0:
        raise HfDmsError(f"repair: ridge must be positive, got {ridge}. 0.01 is the default.")
    for name, model in (("pruned", pruned), ("dense", dense)):
        if has_gates(model):
            raise HfDmsError(f"repair: the {name} model has gates. Take them off with hf_dms.detach_(model) first.")


def _check_plan(student: Walk, teacher: Walk, kept_layers: list[int], units: Tensor) -> None:
    found, dense = ((len(walk.layers), walk.hidden[0].shape[-1]) for walk in (student, teacher))
    planned = (len(kept_layers), len(units))
    if found != planned or kept_layers[-1] >= dense[0] or units[-1] >= dense[1]:
        raise HfDmsError(
            f"repair: the pruned model has {found[0]} layers and a residual stream of {found[1]}; the plan keeps "
            f"{planned[0]} layers, up to layer {kept_layers[-1]}, and {planned[1]} units, up to unit {int(units[-1])}; "
            f"the dense model has {dense[0]} and {dense[1]}. Give the plan and the dense model that it was cut by."
        )
