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

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..archs.restoring import evaluating
from ..cut.plan import Plan, kept_units
from ..errors import HfDmsError
from ..gating.attach import has_gates
from .curvature import Sums, collect_
from .layerwise import Batches, Places, Walk, find_places, stream_dim, targets_of_layers


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
    with evaluating(dense, pruned):
        teacher, student = Walk(dense, bound, batches), Walk(pruned, bound, batches)
        _check_plan(student, teacher, kept_layers, units)
        places = find_places(teacher, bound)
        for layer in range(kept_layers[0]):
            teacher.advance(layer)
        for position, layer in enumerate(kept_layers):
            end = kept_layers[position + 1] if position + 1 < len(kept_layers) else bound.num_layers
            targets = targets_of_layers(teacher, places, range(layer, end), units)
            for path in places.writes:
                target = [batch.pop(path).to(pruned.device) for batch in targets]
                module: Any = student.layers[position].get_submodule(path)
                sums = Sums.of(module)
                collect_([sums], student, places, position, path, target, batches)
                _update_(module, sums, ridge, f"{path} of layer {layer}")
            if end > layer + 1:
                _take_over_norm_(student.layers[position], teacher.layers[end - 1], places, units)
            student.advance(position)


# ---- both models, layer by layer -------------------------------------------------------------------------------------
def _take_over_norm_(kept: nn.Module, dropped: nn.Module, places: Places, units: Tensor) -> None:
    """Give a layer the norm behind another one's last write, if the stream passes it."""
    for path in places.norms[-1:]:
        for name, parameter in kept.get_submodule(path).named_parameters():
            source = dropped.get_submodule(path).get_parameter(name)
            parameter.copy_(source.index_select(0, units.to(source.device)))


# ---- least squares ---------------------------------------------------------------------------------------------------
def _update_(module: Any, sums: Sums, ridge: float, name: str) -> None:
    """Add (AᵀA + ridge·mean(diag AᵀA)·I)⁻¹ AᵀR to a linear map; its bias is the last input, which the mean leaves out.

    Raises:
        ValueError: the sums are not finite, or not positive definite.
    """
    width, gram, moment = module.in_features, sums.gram, sums.moment
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
