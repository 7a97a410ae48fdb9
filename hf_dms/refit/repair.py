"""Repair: least squares on the linear maps that write into the residual stream of a cut model, without training.

A cut leaves the remaining weights as they were. Layer after layer, each map that writes into the stream (`o_proj` and
`down_proj` of a Llama, found from the description) gets the weight that brings the stream closest to the dense model's.
With A `[tokens, inputs]` the map's inputs in the cut model, as repaired so far, and R `[tokens, hidden]` what the
stream lacks after it (the dense one minus the cut one, on the kept hidden units), its change is ridge regression:

    ΔWᵀ = (AᵀDA + ridge·mean(diag AᵀDA)·I)⁻¹ AᵀDR

where D weighs a position by 1 / mean square of the dense stream, so that an error counts relative to it. So a cut that
changes nothing is left as it is. The last map of a layer aims past the dropped layers that follow; where the stream
itself is normalised (BERT) the layer takes over the norm of the last one dropped, which belongs to the sum aimed at. A
bias is one more input, always 1. Nothing else of the model moves.

Where what a map writes is scaled or normalised before it is added (Granite, DINOv2, Gemma 2 and 3), R is stated before
that; a norm keeps its own size, so a map in front of one can make up for less.

The ridge is chosen for each map: the one whose solution on three quarters of the batches leaves the least error on the
last quarter. The map is then solved on all of them.

Both models walk side by side, one layer at a time, and batches stream. Memory: one map's sums (inputs² and inputs times
hidden, in float64), and the hidden states of all batches, for both models and for one layer's targets, which `offload`
keeps in files. Never the activations of all layers, never a second copy of a model.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..archs.restoring import evaluating
from ..cut.plan import Plan, kept_units
from ..cut.prune import plan_of
from ..cut.verify import open_gates
from ..errors import HfDmsError
from ..gating.attach import has_gates
from .curvature import Sums, collect_
from .interpolate import Interpolation
from .layerwise import LayerWalk, StreamModules, find_stream_modules, stream_dim, targets_of_layers
from .reconstruct import reconstruct_
from .shelf import Shelf

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # that one is chosen from
FIXED_RIDGE = 0.1  # with a single batch, of which none can be held out
HELD_OUT = 4  # one batch of so many, to choose the ridge on
MOST_JUDGES = 16  # batches on which the loss says how much of a repair stays


@torch.no_grad()
def repair_(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    plan: Plan | None,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    ridge: float | None = None,
    offload: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    epochs: int = 0,
    interpolate: bool = False,
) -> float:
    """Bring the residual stream of a cut model back to the dense one's, in place.

    Args:
        pruned: the cut model, on one device.
        dense: the model it was cut from; it is left as it was. Gates on it are open. After a search that trained the
            weights: the model before it, since with open masks the trained one is no model to aim at.
        plan: the units that were kept. None: those that the gates of `dense` keep, as `prune` cut it.
        batches: keyword arguments of forward passes, read once; more of them repair better. Positions where an
            `attention_mask` `[batch, tokens]` is 0 do not count; labels are left out.
        ridge: how strongly a weight is held back, relative to the mean square of its inputs. Default: chosen for each
            map on held-out batches, one in four; 0.1 for a single batch.
        offload: a folder for the hidden states of all batches, `[tokens, hidden]` for both models and twice for the
            targets of a layer. Default: the device's memory.
        progress: called after each layer with the number of layers that are done and that of all.
        epochs: passes over the batches in which all maps of a sub-block learn together after its least squares
            (reconstruct.py). With four of them a repair took 3.5 times as long (benchmarks/reconstruct.jsonl).
        interpolate: keep only as much of the change as lowers the task's loss (interpolate.py). Batches need labels.
            The weights before and after wait in the memory of the CPU.

    Returns:
        The share of the change that was kept: 1 without `interpolate`.

    Raises:
        ValueError: no batches, none with labels for `interpolate`, a single one with `epochs`, a pruned model with
            gates, no plan, a plan of another cut, activations that are not finite, or layers that do not write into the
            stream as a Llama's, a BERT's, a Granite's, a Gemma 2's or a DINOv2's do. Layers before the one that an
            error is about are repaired by then.
    """
    _check(pruned, dense, plan, ridge)
    plan = plan_of(dense) if plan is None else plan
    bound = bind(spec_for(dense.config), dense)
    stream = stream_dim(bound)
    units = kept_units(plan, stream, None, bound.sizes[stream])
    kept_layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    before = Interpolation(pruned) if interpolate else None
    judges: list[Mapping[str, Tensor]] = []
    with evaluating(dense, pruned), open_gates(dense), _folder_in(offload) as folder:
        teacher, student = LayerWalk(dense, bound, offload=folder), LayerWalk(pruned, bound, offload=folder)
        masks = []
        for number, batch in enumerate(batches):
            if number % HELD_OUT == 0 and len(judges) < MOST_JUDGES:
                judges.append(batch)
            masks.append(_mask_of(batch))
            teacher.add_(batch)
            student.add_(batch)
        _check_walks(student, teacher, kept_layers, units, epochs)
        places = find_stream_modules(teacher, bound)
        for layer in range(kept_layers[0]):
            teacher.advance(layer)
        ends = [*kept_layers[1:], bound.num_layers]
        for position, (layer, end) in enumerate(zip(kept_layers, ends)):
            targets = targets_of_layers(teacher, places, range(layer, end), units)
            for path in places.writes:
                _refit_(student, places, position, path, targets[path], masks, ridge, f"{path} of layer {layer}")
                if epochs:
                    reconstruct_(student, places, position, path, targets[path], masks, epochs)
                targets[path].clear()
            if end > layer + 1:
                _take_over_norm_(student.layers[position], teacher.layers[end - 1], places, units)
            student.advance(position)
            if progress is not None:
                progress(position + 1, len(kept_layers))
        return 1.0 if before is None else before.keep_best_share_(judges)


# ---- both models, layer by layer -------------------------------------------------------------------------------------
def _take_over_norm_(kept: nn.Module, dropped: nn.Module, places: StreamModules, units: Tensor) -> None:
    """Give a layer the norm behind another one's last write, if the stream passes it."""
    for path in places.norms[-1:]:
        for name, parameter in kept.get_submodule(path).named_parameters():
            source = dropped.get_submodule(path).get_parameter(name)
            parameter.copy_(source.index_select(0, units.to(source.device)))


def _folder_in(offload: str | os.PathLike | None) -> contextlib.AbstractContextManager[str | None]:
    """A temporary folder in another one, if there is one."""
    if offload is None:
        return contextlib.nullcontext()
    return tempfile.TemporaryDirectory(prefix="hf_dms-", dir=offload)


def _mask_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The attention mask of a batch, if it has one.

    Raises:
        ValueError: the mask is not one of positions.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise HfDmsError(
            f"repair: the attention_mask of a batch has shape {tuple(mask.shape)}, expected [batch, tokens]."
        )
    return mask


# ---- least squares ---------------------------------------------------------------------------------------------------
def _refit_(
    student: LayerWalk,
    places: StreamModules,
    layer: int,
    path: str,
    targets: Shelf,
    masks: Sequence[Tensor | None],
    ridge: float | None,
    name: str,
) -> None:
    """Bring the stream after a map that writes into it closest to its targets, see `collect_`."""
    module: Any = student.layers[layer].get_submodule(path)
    parts = [Sums.of(module) for _ in range(min(HELD_OUT, len(masks)))]
    collect_(parts, student, places, layer, path, targets, masks)
    _update_(module, parts, ridge, name)


def _update_(module: Any, parts: Sequence[Sums], ridge: float | None, name: str) -> None:
    """Change a linear map by the ridge regression of what its output lacks.

    Raises:
        ValueError: the sums are not finite, or not positive definite.
    """
    *fitted, last = parts
    if ridge is None:
        ridge = best_ridge(sum(fitted[1:], fitted[0]), last, module.in_features) if fitted else FIXED_RIDGE
    change = ridge_change(sum(fitted, last), module.in_features, ridge).T
    if not change.isfinite().all():
        raise HfDmsError(
            f"repair: the least squares of {name} have no finite solution at ridge {ridge}. Raise it; if that does not "
            "help, the activations of the model on these batches are not finite: check the data, or use a wider dtype."
        )
    module.weight.copy_(module.weight.double() + change[:, : module.in_features])
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + change[:, module.in_features])


def ridge_change(sums: Sums, width: int, ridge: float) -> Tensor:
    """ΔWᵀ = (AᵀDA + ridge·mean(diag AᵀDA)·I)⁻¹ AᵀDR, `[inputs, outputs]`; not finite where there is no solution.

    Args:
        sums: of a map.
        width: inputs that are no bias; the mean is theirs.
        ridge: relative to their mean square.
    """
    gram = sums.gram.clone()
    gram.diagonal().add_((ridge * gram.diagonal()[:width].mean()).clamp(min=torch.finfo(gram.dtype).tiny))
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.full_like(sums.moment, torch.nan) if failed else torch.cholesky_solve(sums.moment, factor)


def best_ridge(fitted: Sums, held_out: Sums, width: int) -> float:
    """Of `RIDGES`, the one whose change leaves the least squared error |R − A ΔWᵀ|² on held-out sums."""

    def error(ridge: float) -> float:
        change = ridge_change(fitted, width, ridge)
        left = (change * (held_out.gram @ change - 2 * held_out.moment)).sum() + held_out.missing
        return float(left.nan_to_num(torch.inf))

    return min(RIDGES, key=error)


# ---- checks ----------------------------------------------------------------------------------------------------------
def _check(pruned: PreTrainedModel, dense: PreTrainedModel, plan: Plan | None, ridge: float | None) -> None:
    if ridge is not None and not ridge > 0:
        raise HfDmsError(
            f"repair: ridge must be positive, got {ridge}. Leave it out to have it chosen on held-out batches."
        )
    if has_gates(pruned):
        raise HfDmsError("repair: the pruned model has gates. Take them off with hf_dms.detach_(model) first.")
    if plan is None and not has_gates(dense):
        raise HfDmsError(
            "repair: the dense model has no gates that say what was kept, so a plan is needed. Give what "
            "hf_dms.plan_of(model) returned before they were taken off."
        )


def _check_walks(student: LayerWalk, teacher: LayerWalk, kept_layers: list[int], units: Tensor, epochs: int) -> None:
    if not len(student.hidden):
        raise HfDmsError("repair needs at least one batch, got none.")
    if epochs and len(student.hidden) == 1:
        raise HfDmsError("repair: with epochs one batch is held out, so it needs at least two, got one.")
    found, dense = ((len(walk.layers), walk.hidden[0].shape[-1]) for walk in (student, teacher))
    planned = (len(kept_layers), len(units))
    if found != planned or kept_layers[-1] >= dense[0] or units[-1] >= dense[1]:
        raise HfDmsError(
            f"repair: the pruned model has {found[0]} layers and a residual stream of {found[1]}; the plan keeps "
            f"{planned[0]} layers, up to layer {kept_layers[-1]}, and {planned[1]} units, up to unit {int(units[-1])}; "
            f"the dense model has {dense[0]} and {dense[1]}. Give the plan and the dense model that it was cut by."
        )
