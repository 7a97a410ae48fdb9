"""Repair: least squares on the maps that write into the residual stream of a cut model, without training.

A cut leaves the remaining weights as they were. Layer after layer, each map that writes into the stream (`o_proj` and
`down_proj` of a Llama, the last convolution of a ResNet's block, found from the description) gets the weight that
brings the stream closest to the dense model's. With A `[positions, inputs]` the map's inputs in the cut model, as
repaired so far, and R `[positions, hidden]` what the stream lacks after it (the dense one minus the cut one, on the
kept hidden units), its change is ridge regression:

    ΔWᵀ = (AᵀDA + ridge·mean(diag AᵀDA)·I)⁻¹ AᵀDR

where D weighs a position by 1 / mean square of the dense stream, so that an error counts relative to it; all positions
alike where no norm over units reads the stream (ResNet). So a cut that changes nothing is left as it is. The last map
of a layer aims past the dropped layers that follow; where the stream itself is normalised (BERT) the layer takes over
the norm of the last one dropped, which belongs to the sum aimed at. A bias is one more input, always 1. Nothing else of
the model moves but running statistics of batch norms, with what makes up for that (batch_norms.py).

Where what a map writes is scaled or normalised before it is added (Granite, DINOv2, ConvNeXt, ResNet, Gemma 2 and 3), R
is stated before that; a norm keeps its own size, so a map in front of one can make up for less.

Positions are tokens, or places of an image. A convolution's inputs are unfolded, one batch at a time. The stream is
aimed at before the ReLU that a ResNet's block ends in. Where a stage begins with a new stream, the maps that write into
it (a block's last convolution, then its shortcut) write all of it; what lies between two stages stays as it is.

The ridge is chosen for each map: the one whose solution on three quarters of the batches leaves the least error on the
last quarter. The map is then solved on all of them.

Both models walk side by side, one layer at a time, and batches stream. Memory: one map's sums (inputs² and inputs times
hidden, in float64), and the hidden states of all batches, for both models and for one layer's targets, which `offload`
keeps in files. Never the activations of all layers, never a second copy of a model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec, bind
from ..archs.registry import spec_for
from ..archs.restoring import evaluating
from ..cut.plan import Plan, kept_units
from ..cut.prune import plan_of
from ..cut.verify import open_gates
from ..errors import HfDmsError
from ..gating.attach import has_gates
from .batch_norms import batch_norms, estimate_inner_norms_, estimate_outer_norm_
from .curvature import Sums, collect_
from .interpolate import Interpolation
from .layerwise import LayerWalk, targets_of_layers
from .reconstruct import reconstruct_
from .shelf import Shelf
from .stream import StreamModules, stream_dim

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
    interpolate: bool | Callable[[float], None] = False,
) -> None:
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
            The weights before and after wait in the memory of the CPU. A function is called with the share that stays.

    Raises:
        ValueError: no batches, none with labels for `interpolate`, a single one with `epochs`, a pruned model with
            gates, no plan, a plan of another cut, activations that are not finite, or layers that do not write into the
            stream as a Llama's, a BERT's, a Granite's, a Gemma 2's, a DINOv2's or a ResNet's do. Layers before the one
            that an error is about are repaired by then.
    """
    _check(pruned, dense, plan, ridge)
    plan = plan_of(dense) if plan is None else plan
    bound = bind(spec_for(dense.config), dense)
    line = Interpolation(pruned) if interpolate else None
    judges: list[Mapping[str, Tensor]] = []
    with evaluating(dense, pruned), open_gates(dense), _folder_in(offload) as folder:
        teacher, student = LayerWalk(dense, bound, offload=folder), LayerWalk(pruned, bound, offload=folder)
        _check_layers(student, plan)
        masks = []
        for number, batch in enumerate(batches):
            if number % HELD_OUT == 0 and len(judges) < MOST_JUDGES:
                judges.append(batch)
            masks.append(_mask_of(batch))
            teacher.add_(batch)
            student.add_(batch)
        _check_batches(masks, epochs)
        passed, ranges = 0, _kept_ranges(bound, plan)
        for position, layers in enumerate(ranges):
            for layer in range(passed, layers.start):
                teacher.advance(layer)
            passed = layers.stop
            stack, number = teacher.places[layers.start]
            units = _kept_stream(bound, plan, stack)
            places, targets = targets_of_layers(teacher, layers, units)
            where = f"layer {number}" if len(bound.stacks) == 1 else f"layer {number} of {stack}"
            _repair_layer_(student, places, position, targets, masks, ridge, epochs, where)
            if len(layers) > 1:
                _take_over_norm_(student.layers[position], teacher.layers[layers[-1]], places, units)
            student.advance(position)
            if progress is not None:
                progress(position + 1, len(ranges))
        if line is not None:
            line.keep_best_share_(judges)
            if callable(interpolate):
                interpolate(line.share)


def _repair_layer_(
    student: LayerWalk,
    places: StreamModules,
    layer: int,
    targets: Mapping[str, Shelf],
    masks: Sequence[Tensor | None],
    ridge: float | None,
    epochs: int,
    where: str,
) -> None:
    """Repair the maps of a layer in the order in which they run, its batch norms before and behind them."""
    lacks = _norms_lack(student, places, layer, targets)
    if lacks:
        estimate_inner_norms_(student, places, layer)
    for path in places.writes:
        _refit_(student, places, layer, path, targets[path], masks, ridge, f"{path} of {where}")
        if epochs:
            reconstruct_(student, places, layer, path, targets[path], masks, epochs)
        if lacks:
            estimate_outer_norm_(student, places, layer, path)
        targets[path].clear()


# ---- both models, layer by layer -------------------------------------------------------------------------------------
def _kept_ranges(bound: BoundSpec, plan: Plan) -> list[range]:
    """Each kept layer with the dropped ones behind it, numbered through all stacks of the dense model."""
    ranges, first = [], 0
    for stack in bound.stacks:
        kept = kept_units(plan, stack, None, bound.sizes[stack]).tolist()
        ends = [*kept[1:], bound.sizes[stack]]
        ranges += [range(first + layer, first + end) for layer, end in zip(kept, ends)]
        first += bound.sizes[stack]
    return ranges


def _kept_stream(bound: BoundSpec, plan: Plan, stack: str) -> Tensor:
    """Which units of the residual stream of a stack stay."""
    stream = stream_dim(bound, stack)
    return kept_units(plan, stream, None, bound.sizes[stream])


def _take_over_norm_(kept: nn.Module, dropped: nn.Module, places: StreamModules, units: Tensor) -> None:
    """Give a layer the norm behind another one's last write, if the stream passes it."""
    for path in places.norms[-1:]:
        for name, parameter in kept.get_submodule(path).named_parameters():
            source = dropped.get_submodule(path).get_parameter(name)
            parameter.copy_(source.index_select(0, units.to(source.device)))


def _norms_lack(student: LayerWalk, places: StreamModules, layer: int, targets: Mapping[str, Shelf]) -> bool:
    """Whether the stream of the first batch is not what it should be, to the bit, after a map of a layer.

    Only batch norms need to know; a layer without them is not run for it.
    """
    if not batch_norms(student.layers[layer]):
        return False
    sums = student.run(layer, 0, places).sums
    return not all(torch.equal(sums[path], targets[path][0].to(sums[path].device)) for path in places.writes)


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
    """Change a map by the ridge regression of what its output lacks.

    Raises:
        ValueError: the sums are not finite, or not positive definite.
    """
    *fitted, last = parts
    weight = module.weight.flatten(1)
    width = weight.shape[1]
    if ridge is None:
        ridge = best_ridge(sum(fitted[1:], fitted[0]), last, width) if fitted else FIXED_RIDGE
    change = ridge_change(sum(fitted, last), width, ridge).T
    if not change.isfinite().all():
        raise HfDmsError(
            f"repair: the least squares of {name} have no finite solution at ridge {ridge}. Raise it; if that does not "
            "help, the activations of the model on these batches are not finite: check the data, or use a wider dtype."
        )
    module.weight.copy_((weight.double() + change[:, :width]).view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + change[:, width])


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
    """Of `RIDGES`, the one whose change leaves the least squared error |R − A ΔWᵀ|² on held-out sums.

    The error falls, then rises with the ridge: from the middle one on, only neighbours of the best so far are solved.
    Of equal ones the larger is taken. Float32 tells them apart, and takes half the time.
    """
    fitted, held_out = fitted.to(torch.float32), held_out.to(torch.float32)

    @functools.cache
    def error(place: int) -> float:
        change = ridge_change(fitted, width, RIDGES[place])
        left = (change * (held_out.gram @ change - 2 * held_out.moment)).sum() + held_out.missing
        return float(left.nan_to_num(torch.inf))

    best, before = RIDGES.index(FIXED_RIDGE), -1
    while best != before:
        before = best
        best = min(range(min(best + 1, len(RIDGES) - 1), max(best - 1, 0) - 1, -1), key=error)
    return RIDGES[best]


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


def _check_layers(student: LayerWalk, plan: Plan) -> None:
    """Check that the pruned model's layers are those that a plan keeps of the dense one, and their streams as wide."""
    bound = student.bound
    for stack, path in bound.stacks.items():
        units, kept = _kept_stream(bound, plan, stack), kept_units(plan, stack, None, bound.sizes[stack])
        found = [layer for layer, place in zip(student.layers, student.places) if place[0] == stack]
        inside, stream = f"{path}.{int(kept[0])}.", stream_dim(bound, stack)
        written = (name for name, param in bound.params.items() if param.axes[0] == (stream,))
        own = next(name.removeprefix(inside) for name in written if name.startswith(inside))
        width, dense = len(found[0].get_parameter(own)), (bound.sizes[stack], bound.sizes[stream])
        if (len(found), width) != (len(kept), len(units)) or kept[-1] >= dense[0] or units[-1] >= dense[1]:
            raise HfDmsError(
                f"repair: the pruned model has {len(found)} layers and a residual stream of {width}; the plan keeps "
                f"{len(kept)} layers, up to layer {int(kept[-1])}, and {len(units)} units, up to unit {units[-1]}; the "
                f"dense model has {dense[0]} and {dense[1]} ({stack}). Give the plan and the dense model that it was "
                "cut by."
            )


def _check_batches(masks: Sequence[Tensor | None], epochs: int) -> None:
    if not masks:
        raise HfDmsError("repair needs at least one batch, got none.")
    if epochs and len(masks) == 1:
        raise HfDmsError("repair: with epochs one batch is held out, so it needs at least two, got one.")
