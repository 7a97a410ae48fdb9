"""Repair (least-squares reconstruction): it brings a cut model's outputs back towards the dense model's, without
training.

A cut does not change the remaining weights. Repair goes through the layers in order. Each map that writes into the
residual stream (`o_proj` and `down_proj` of a Llama, the last convolution of a ResNet's block, found from the
description) gets the weights that bring the stream closest to the dense model's.

Let A `[positions, inputs]` be the map's inputs in the cut model, with all earlier maps repaired. Let
R `[positions, hidden]` be the dense stream minus the cut one after the map, on the kept hidden units. The change of the
weights is ridge regression:

    ΔWᵀ = (AᵀDA + ridge·mean(diag AᵀDA)·I)⁻¹ AᵀDR

D weighs each position by 1 / mean square of the dense stream, so that an error counts relative to the stream. Where no
norm over units reads the stream (ResNet), all positions count equally. If a cut changes nothing, R and ΔW are 0. A bias
is one more input, which is always 1. Nothing else in the model changes, except in the cases below and in batch
norms (batch_norms.py).

Special cases:

- Where the cut took units of the stream, the maps that read it are changed too (readers.py).
- Dropped layers: the last map of a kept layer aims at the stream after the dropped layers that follow. Where the stream
  itself is normalised (BERT), the kept layer also takes over the norm of the last dropped layer.
- Some models scale or normalise a map's output before it is added to the stream (Granite, DINOv2, ConvNeXt, ResNet,
  Gemma 2 and 3). R is then converted to the map's own output. A norm fixes the size of its output, so a map in front of
  one can correct less.
- Some maps write at positions in another order than the stream has, and at more of them (the padded windows of a Swin).
  Their inputs and outputs are put in the order of the stream.
- Convolutions: positions are places of an image, and inputs are unfolded, one batch at a time. A ResNet's block ends in
  a ReLU, and the target is the stream before it. Where a stage begins a new stream, the first maps that write into it
  (a block's last convolution, then its shortcut) write all of it. Layers between two stages do not change.

The ridge is chosen for each map: each candidate is solved on three quarters of the batches, and the one with the least
error on the last quarter is taken. The map is then solved again on all batches.

Both models go through the batches one layer at a time. Memory: the sums of one map (inputs² and inputs times hidden, in
float64), and the hidden states of all batches, for both models and the targets of one layer; `offload` moves the hidden
states to files. The activations of all layers, or a second copy of a model, are never held.
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
from .layerwise import LayerWalk
from .least_squares import HELD_OUT, update_
from .readers import Readers, readers_of
from .reconstruct import reconstruct_
from .shelf import Shelf
from .stream import StreamModules, stream_dim
from .writes import targets_of_layers

MOST_JUDGES = 16  # with `interpolate`, the loss is measured on at most this many batches


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
        dense: the model it was cut from; it is not modified. If it has gates, they are open during the repair. After a
            search that trained the weights, pass the model before the search: the trained weights with open masks were
            never a good model.
        plan: the units that were kept. None: those that the gates of `dense` keep, as `prune` cut it.
        batches: keyword arguments of forward passes, read once. More batches repair better. Positions where an
            `attention_mask` `[batch, tokens]` is 0 do not count; labels are ignored.
        ridge: how strongly changes of a weight are held back, relative to the mean square of its inputs. Default:
            chosen for each map on held-out batches, one in four; 0.1 for a single batch.
        offload: a folder for the hidden states of all batches, `[tokens, hidden]` for both models and twice for the
            targets of a layer, and once more where the stream was cut. Default: the device's memory.
        progress: called after each layer with the number of layers that are done and the number of all layers.
        epochs: passes over the batches in which all maps of a sub-block learn together, after its least squares
            (reconstruct.py). With four passes a repair took 3.5 times as long (benchmarks/reconstruct.jsonl).
        interpolate: keep only as much of the change as lowers the task's loss (interpolate.py). Batches need labels.
            The weights before and after are kept in CPU memory. If it is a function, it is called with the share that
            was kept.

    Raises:
        ValueError: there are no batches, none with labels for `interpolate`, or a single one with `epochs`; the pruned
            model has gates; there is no plan, or the plan of another cut; activations are not finite; or layers write
            into the stream in a way that `find_stream_modules` does not know. The layers before the one in the message
            are repaired by then.
    """
    _check(pruned, dense, plan, ridge)
    plan = plan_of(dense) if plan is None else plan
    # Bound anew, not taken from the gates: with a plan, the dense model needs no gates.
    bound = bind(spec_for(dense.config), dense)
    # A copy of the weights as they are before the first layer changes.
    line = Interpolation(pruned) if interpolate else None
    with evaluating(dense, pruned), open_gates(dense), _folder_in(offload) as folder:
        teacher = LayerWalk(dense, bound, offload=folder)
        student = LayerWalk(pruned, bound, offload=folder, leader=teacher)
        _check_layers(student, plan)
        masks, judges = list[Tensor | None](), list[Mapping[str, Tensor]]()
        _add_batches_((teacher, student), masks, judges, batches)
        _check_batches(masks, epochs)
        if line is not None:
            line.loss(judges[:1])  # an error now, not after a repair that nothing could judge
        _repair_layers_(teacher, student, plan, masks, ridge, epochs, progress)
        if line is not None:
            line.keep_best_share_(judges)
            if callable(interpolate):
                interpolate(line.share)


def _repair_layers_(
    teacher: LayerWalk,
    student: LayerWalk,
    plan: Plan,
    masks: list[Tensor | None],
    ridge: float | None,
    epochs: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Repair the layers of the cut model one after the other, in place; arguments as in `repair_`."""
    bound = teacher.bound
    passed, ranges = 0, _kept_ranges(bound, plan)
    for position, layers in enumerate(ranges):
        # Layers that are dropped before the first kept one: the dense model runs them, the cut model has none.
        for layer in range(passed, layers.start):
            teacher.advance(layer)
        passed = layers.stop  # `targets_of_layers` moves the dense model behind all layers of the range
        stack, number = teacher.places[layers.start]
        units = _kept_stream(bound, plan, stack)
        # Before `targets_of_layers`, which moves the dense model on.
        readers = readers_of(teacher, layers.start, plan)
        places, targets = targets_of_layers(teacher, layers, units)
        where = f"layer {number}" if len(bound.stacks) == 1 else f"layer {number} of {stack}"
        _repair_layer_(student, places, position, targets, readers, masks, ridge, epochs, where)
        if len(layers) > 1:
            # The last map now writes the stream behind the dropped layers, which their last norm is made for.
            _take_over_norm_(student.layers[position], teacher.layers[layers[-1]], places, units)
        student.advance(position)
        if progress is not None:
            progress(position + 1, len(ranges))


def _add_batches_(
    walks: Iterable[LayerWalk],
    masks: list[Tensor | None],
    judges: list[Mapping[str, Tensor]],
    batches: Iterable[Mapping[str, Tensor]],
) -> None:
    """Put batches in front of both models, and list their masks and those on which `interpolate` measures the loss."""
    for number, batch in enumerate(batches):
        if number % HELD_OUT == 0 and len(judges) < MOST_JUDGES:
            judges.append(batch)
        masks.append(_mask_of(batch))
        for walk in walks:
            walk.add_(batch)


def _repair_layer_(
    student: LayerWalk,
    places: StreamModules,
    layer: int,
    targets: Mapping[str, Shelf],
    readers: Readers | None,
    masks: Sequence[Tensor | None],
    ridge: float | None,
    epochs: int,
    where: str,
) -> None:
    """Repair the maps of a layer in the order in which they run, and its batch norms before and after them."""
    lacks = _norms_lack(student, places, layer, targets)
    if lacks:
        estimate_inner_norms_(student, places, layer)
    for path in places.writes:
        if readers is not None:
            # Readers first: their outputs are the inputs of the map that writes.
            readers.refit_(student, layer, places, path, masks, ridge, where)
        _refit_(student, places, layer, path, targets[path], masks, ridge, f"{path} of {where}")
        if epochs:
            reconstruct_(student, places, layer, path, targets[path], masks, epochs)
        if lacks:
            estimate_outer_norm_(student, places, layer, path)
        # Each target is read for one map only, and all batches of one are as large as the hidden states themselves.
        targets[path].clear()
    if readers is not None:
        readers.fronts.clear()


# ---- both models, layer by layer -------------------------------------------------------------------------------------
def _kept_ranges(bound: BoundSpec, plan: Plan) -> list[range]:
    """Each kept layer with the dropped layers that follow it, numbered through all stacks of the dense model."""
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
    """Copy the norm after a dropped layer's last write into a kept layer, if the stream itself passes that norm."""
    for path in places.norms[-1:]:
        for name, parameter in kept.get_submodule(path).named_parameters():
            source = dropped.get_submodule(path).get_parameter(name)
            parameter.copy_(source.index_select(0, units.to(source.device)))


def _norms_lack(student: LayerWalk, places: StreamModules, layer: int, targets: Mapping[str, Shelf]) -> bool:
    """Whether the stream of the first batch differs from its target, in any bit, after a map of a layer.

    Only then do a layer's batch norms need new statistics. A layer without batch norms is not run.
    """
    if not batch_norms(student.layers[layer]):
        return False
    sums = student.run(layer, 0, places).sums
    return not all(torch.equal(sums[path], targets[path][0].to(sums[path].device)) for path in places.writes)


def _folder_in(offload: str | os.PathLike | None) -> contextlib.AbstractContextManager[str | None]:
    """A temporary folder inside `offload`, or None without `offload`."""
    if offload is None:
        return contextlib.nullcontext()
    return tempfile.TemporaryDirectory(prefix="hf_dms-", dir=offload)


def _mask_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The attention mask of a batch, if it has one.

    Raises:
        ValueError: the mask does not have one value per position.
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
    """Change a map so that the stream after it comes closest to its targets, see `collect_`."""
    module: Any = student.layers[layer].get_submodule(path)
    parts = [Sums.of(module) for _ in range(min(HELD_OUT, len(masks)))]
    collect_(parts, student, places, layer, path, targets, masks)
    update_([module], parts, ridge, name)


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
    """Check that the pruned model has as many layers, and streams as wide, as a plan keeps of the dense model."""
    bound = student.bound
    for stack, path in bound.stacks.items():
        units, kept = _kept_stream(bound, plan, stack), kept_units(plan, stack, None, bound.sizes[stack])
        found = [layer for layer, place in zip(student.layers, student.places) if place[0] == stack]
        inside, stream = f"{path}.{int(kept[0])}.", stream_dim(bound, stack)
        written = (name for name, param in bound.params.items() if param.axes[0] == (stream,))
        # Any parameter with the stream on its first axis shows how wide the stream of the cut model is.
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
