"""Where a layer writes into the residual stream.

The description tells which maps write. How they write (is the output scaled, is the stream itself normalised?) is found
by running a layer. Nothing here knows a module's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HfDmsError
from ..gating.places import norms
from .layerwise import LayerWalk
from .shelf import Shelf
from .stream import (
    StreamModules,
    StreamRecorder,
    put_in_order,
    same,
    slope,
    stream_dim,
)

# Loose, because it only chooses a candidate: `_as_said` then checks the scale by a run of the layer.
SAME_SCALE = 1e-2  # relative difference below which the fitted scales of two maps count as one common scale


@dataclasses.dataclass(frozen=True)
class LayerNames:
    """The parts of a layer that have to do with the stream, by the description, as paths below the layer.

    Attributes:
        writes: maps with the stream's units as outputs.
        vectors: modules with a parameter that has one number per unit of the stream.
        parameters: parameters of the layer itself that have one number per unit.
    """

    writes: tuple[str, ...]
    vectors: tuple[str, ...]
    parameters: tuple[str, ...]


def _names_in(walk: LayerWalk, layer: int) -> LayerNames:
    bound, (stack, place) = walk.bound, walk.places[layer]
    inside, stream = f"{bound.stacks[stack]}.{place}.", (stream_dim(bound, stack),)
    writes, vectors, parameters = [], [], []
    for name, param in bound.params.items():
        if (param.stack, param.layer) != (stack, place) or param.axes[0] != stream:
            continue
        path, _, kind = name.removeprefix(inside).rpartition(".")
        if not path:
            parameters.append(kind)
        elif len(param.axes) == 1 and kind != "bias":
            vectors.append(path)
        elif len(param.axes) == 2 or (len(param.axes) == 4 and bound.product(param.axes[1]) > 1):
            writes.append(path)  # but no depthwise convolution: it works on each unit separately, inside the layer
    return LayerNames(tuple(writes), tuple(vectors), tuple(parameters))


def find_stream_modules(walk: LayerWalk, layer: int = 0) -> StreamModules:
    """Find how the maps of the next layer write into the stream, by running it.

    The result holds for all layers of the same stack with the same modules.

    Args:
        walk: a model, in front of the layer.
        layer: number of the layer.

    Raises:
        ValueError: the layer is of no known kind. Known: the stream passes norms, or a function at the end of a layer;
            an output passes a norm without a mean, a batch norm or a scale, or is put in another order of positions.
    """
    names, stack = _names_in(walk, layer), walk.places[layer][0]
    # Layers with the same modules write in the same way, so one run per kind of layer is enough.
    if (found := walk.found.get((stack, names))) is not None:
        return found
    for places in _candidates(walk, layer, names):
        if _as_said(walk.layers[layer], places, recorder := walk.run(layer, 0, places)):
            relative = any(norms(walk.bound, stream_dim(walk.bound, stack)))
            # `sums` has the maps in the order in which they ran; the description may list them in another.
            found = dataclasses.replace(places, writes=tuple(recorder.sums), relative=relative)
            walk.found[stack, names] = found
            return found
    raise HfDmsError(
        f"repair: what {', '.join(names.writes)} of a {walk.bound.spec.model_type} layer write is not added to the "
        "residual stream as it is, scaled or normalised, or not everything that is added comes from them. This "
        "architecture cannot be repaired."
    )


def _candidates(walk: LayerWalk, layer: int, names: LayerNames) -> Iterator[StreamModules]:
    """The ways in which a layer may write into the stream, the simplest first; `find_stream_modules` tries them."""
    module, writes, vectors = walk.layers[layer], names.writes, names.vectors
    # Least squares of a grouped convolution would have to be solved group by group.
    if any(getattr(module.get_submodule(path), "groups", 1) > 1 for path in writes):
        return
    # Modules without parameters or children: activations, identities. One of them may end the layer (the ReLU of a
    # ResNet).
    simple = [path for path, part in module.named_modules() if not [*part.children(), *part.parameters()]]
    with _heard(module, (*writes, *vectors, *simple)) as heard:
        whole = walk.run(layer, 0, StreamModules()).output
    endings = [path for path in simple if path in heard and same(heard[path][1], whole)]
    behind = {
        path: vector
        for path, vector in itertools.product(writes, vectors)
        if path in heard and vector in heard and same(heard[vector][0], heard[path][1])
    }
    plain = [StreamModules(writes), StreamModules(writes, behind=behind)]
    # Norms that the stream itself passes (BERT) have the stream's shape, not that of a head or an image.
    if all(path in heard and heard[path][0].shape == whole.shape for path in vectors):
        plain.append(StreamModules(writes, vectors))
    if len(writes) == len(names.parameters):
        plain.append(StreamModules(writes, channels=dict(zip(writes, names.parameters))))
    # A layer that returns another shape must begin a new stream; one that returns the same shape may.
    goes_on = walk.hidden[0].shape == whole.shape
    written = {path: heard[path] for path in writes if path in heard}
    if (moved := _moved(walk, layer, written, simple, walk.units_last(whole).shape)) is None:
        return
    for ending, fresh in itertools.product((None, *endings), (False, True) if goes_on else (True,)):
        yield from (dataclasses.replace(places, moved=moved, ending=ending, fresh=fresh) for places in plain)
    if goes_on and not moved:
        yield StreamModules(writes, scale=_common_scale(walk.run(layer, 0, StreamModules(writes))))


def _moved(
    walk: LayerWalk, layer: int, heard: Mapping[str, tuple[Tensor, Tensor]], simple: Sequence[str], stream: torch.Size
) -> dict[str, str] | None:
    """`StreamModules.moved` of a layer, empty where every linear map writes at the positions of the stream.

    Args:
        walk: a model, in front of the layer.
        layer: number of the layer.
        heard: input and output of the maps that write.
        simple: paths of the modules without parameters.
        stream: the shape of the stream, with units on the last axis.

    Returns:
        None if there is no module in front of which the positions are put in the order of the stream.
    """
    module, (args, kwargs) = walk.layers[layer], walk.calls[0][layer]
    call = functools.partial(module, walk.hidden[0], *args, **kwargs)
    found = {
        path: put_in_order(module, path, simple, stream, call)
        for path, (_, output) in heard.items()
        if isinstance(module.get_submodule(path), nn.Linear) and output.shape != stream
    }
    return None if None in found.values() else {path: place[0] for path, place in found.items() if place}


@contextlib.contextmanager
def _heard(layer: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Context: record input and output of modules of a layer, with units on the axis where the module has them."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                heard[path] = (args[0].clone(), output.clone())  # the layer may add to them in place

        return hook

    hooks = [layer.get_submodule(path).register_forward_hook(hook_of(path)) for path in paths]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _as_said(layer: nn.Module, places: StreamModules, recorder: StreamRecorder) -> bool:
    """Whether the stream that the recorder computed equals the one that the layer returned."""
    if not recorder.sums or recorder.stream is None or not same(recorder.before_end, recorder.stream):
        return False
    # A norm that the stream passes gets the sum so far, or else something was added that is not in `writes`.
    if not all(same(into, total) for into, total in zip(recorder.normed.values(), recorder.sums.values())):
        return False
    runs = ((path, output, recorder.added[path]) for path, output in recorder.outputs.items())
    return all(slope(layer, places, *run) is not None for run in runs)


def _common_scale(run: StreamRecorder) -> float:
    """The common factor by which a layer multiplies its maps' outputs before adding them; nan if there is none."""
    assert run.stream is not None
    # One column per map: which factors of their outputs give what the layer added?
    outputs = torch.stack([output.double().flatten() for output in run.outputs.values()], dim=1)
    # `run` added the outputs themselves; less them, its stream is the one in front of the layer.
    added = run.before_end.double().flatten() - (run.stream.double().flatten() - outputs.sum(1))
    if not added.isfinite().all() or not outputs.isfinite().all():
        return math.nan
    scales = torch.linalg.lstsq(outputs, added[:, None]).solution[:, 0]
    return float(scales[-1]) if bool((scales - scales[-1]).abs().max() < SAME_SCALE * scales.abs().max()) else math.nan


def targets_of_layers(teacher: LayerWalk, layers: range, units: Tensor) -> tuple[StreamModules, dict[str, Shelf]]:
    """Run the dense model through a kept layer and the dropped layers that follow it.

    Returns:
        Where the kept layer writes; and for each of its maps and every batch the target stream after the map, `[...,
        kept hidden units]`. It is the dense stream after the same map. For the last map it is the stream after the last
        of these layers.
    """
    kept = find_stream_modules(teacher, layers[0])
    targets = {path: Shelf(teacher.offload) for path in kept.writes}
    for layer in layers:
        places = find_stream_modules(teacher, layer)
        wanted = {path: path for path in kept.writes[:-1]} if layer == layers[0] else {}
        if layer == layers[-1]:
            wanted[kept.writes[-1]] = places.writes[-1]
        for batch in range(len(teacher.hidden)):
            recorder = teacher.run(layer, batch, places)
            teacher.pass_(layer, batch, recorder.output)
            for path, source in wanted.items():
                total = recorder.sums[source]
                targets[path].append(total.index_select(-1, units.to(total.device)))
    return kept, targets
