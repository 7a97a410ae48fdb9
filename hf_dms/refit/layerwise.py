"""A model's layers, run one by one, with their inputs and the outputs that they add to the residual stream.

repair.py goes through a dense and a cut model with it. The description tells which maps write into the stream. How they
write (is the output scaled, is the stream itself normalised?) is found by running a layer. Nothing here knows a
module's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.restoring import restoring
from ..errors import HfDmsError
from ..gating.attach import norms
from .shelf import Shelf
from .stream import (
    Stop,
    StreamModules,
    StreamRecorder,
    added_otherwise,
    check_streams,
    put_in_order,
    same,
    slope,
    stream_axis,
    stream_dim,
)

# Loose, because it only chooses a candidate: `_as_said` then checks the scale by a run of the layer.
SAME_SCALE = 1e-2  # relative difference below which the fitted scales of two maps count as one common scale

Call = tuple[tuple[Any, ...], dict[str, Any]]


def layers_of(model: PreTrainedModel, bound: BoundSpec, stack: str | None = None) -> list[nn.Module]:
    """The layers of a model, or of a model cut from it: of its only stack, or of the stack with this depth dim."""
    base: Any = model.base_model
    return list(base.get_submodule(bound.spec.stacks[bound.depth if stack is None else stack]).children())


# ---- where a layer writes, derived from the description and from running one -----------------------------------------
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


# ---- layer by layer --------------------------------------------------------------------------------------------------
class LayerWalk:
    """A model's layers (of all its stacks, in order), and the state of every batch on its way through them.

    Attributes:
        bound: the architecture.
        layers: the layers.
        places: for each layer, the depth dim of its stack and its index there.
        calls: per batch and layer, the arguments of the layer's call without the hidden state.
        hidden: per batch, the hidden state in front of the next layer, in the layer's own form.
        found: results of `find_stream_modules`.

    Args:
        model: the model.
        bound: its architecture, or that of the model that it was cut from.
        batches: keyword arguments of forward passes; they are read once.
        offload: a folder for calls and hidden states. Default: memory.
        leader: the walk of another model through the same batches, which is never behind this one. Where a detector
            chooses its queries in each image, this model takes those that the other one chose, in the same order.

    Raises:
        HfDmsError: the layers of a stack write streams of different widths.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bound: BoundSpec,
        batches: Iterable[Mapping[str, Tensor]] = (),
        offload: str | os.PathLike | None = None,
        leader: LayerWalk | None = None,
    ) -> None:
        check_streams(bound)
        base: Any = model.base_model
        stacks = {stack: layers_of(model, bound, stack) for stack in bound.spec.stacks}
        self.bound = bound
        self.layers = [layer for layers in stacks.values() for layer in layers]
        self.places = [(stack, place) for stack, layers in stacks.items() for place in range(len(layers))]
        self.offload = offload
        self.calls, self.hidden = Shelf(offload), Shelf(offload)
        self.found: dict[tuple[str, LayerNames], StreamModules] = {}
        self._axis = stream_axis(bound)
        self._inputs = Shelf(offload)  # inputs of the model, to run the modules between two stacks or chained layers
        self._done = Shelf(offload)  # per batch, by a layer's number, what it returned, if that matters to later calls
        self._scores = Shelf(offload)  # per batch, the scores by which a detector chose its queries
        self._leader = leader
        self._base = base
        self._in_tuple: int | None = None  # length of the tuple that a layer returns, 0 for a tensor; once one has run
        # A cache would be among the arguments of each call, and grow whenever a layer runs again.
        self._options = {} if bound.spec.cache is None else {"use_cache": False}
        for batch in batches:
            self.add_(batch)

    def units_last(self, hidden: Tensor) -> Tensor:
        """A layer's hidden state with the units of the stream on the last axis."""
        return hidden.movedim(self._axis, -1)

    def add_(self, batch: Mapping[str, Tensor]) -> None:
        """Add a batch, in front of the first layer; labels are ignored."""
        device = self._base.device
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        # The model runs with its layers skipped: embeddings, masks and rotary tables are computed as it computes them,
        # whatever its architecture.
        with self._skipped() as calls, self._choosing(len(self.hidden)):
            self._base(**inputs, **self._options)
        # The first layer's input is the state of the batch in front of all layers.
        self.hidden.append(calls[0][0])
        self.calls.append([call for _, call in calls])
        if len(self.bound.spec.stacks) > 1:
            self._inputs.append(inputs)
            self._done.append({})

    def run(
        self,
        layer: int,
        batch: int,
        places: StreamModules,
        until: str | None = None,
        hidden: Tensor | None = None,
    ) -> StreamRecorder:
        """Run a layer on a batch.

        Args:
            layer: number of the layer.
            batch: number of the batch.
            places: where it writes.
            until: the map after whose write the run stops. Default: at the end.
            hidden: the hidden state in front of the layer. Default: the batch's, which is in front of this layer.
        """
        args, kwargs = self.calls[batch][layer]
        module, hidden = self.layers[layer], self.hidden[batch] if hidden is None else hidden
        call = functools.partial(module, hidden, *args, **kwargs)
        orders = {}
        for path, after in places.moved.items():
            found = put_in_order(module, path, [after], self.units_last(hidden).shape, call)
            _, orders[path] = found or added_otherwise(path)
        recorder = StreamRecorder(hidden, until, self._axis, orders)
        with contextlib.suppress(Stop), recorder.on(module, places):
            output = call()
            recorder.output = output[0] if isinstance(output, tuple) else output
        return recorder

    def advance(self, layer: int) -> None:
        """Run a layer on every batch, and move the batches behind it."""
        for batch in range(len(self.hidden)):
            self.pass_(layer, batch, self.run(layer, batch, StreamModules()).output)

    def pass_(self, layer: int, batch: int, output: Tensor) -> None:
        """Move a batch behind a layer that returned `output`, in front of the next layer.

        If that is the first layer of the next stack, the modules between the two stacks are run too. For that the whole
        model runs with all layers skipped, and the layers of the finished stack return `output`. The same happens
        between the layers of a chained stack, which return what each of them returned.
        """
        stack, chained = self.places[layer][0], self.bound.spec.chained
        if layer + 1 < len(self.layers) and (self.places[layer + 1][0] != stack or stack in chained):
            finished = [number for number, place in enumerate(self.places) if place[0] == stack]
            outputs = {layer: output} if stack in chained else dict.fromkeys(finished, output)
            if chained:
                outputs = self._done[batch] = self._done[batch] | outputs
            with self._skipped(outputs) as calls, self._choosing(batch):
                self._base(**self._inputs[batch], **self._options)
            output = calls[layer + 1][0]
            before = self.calls[batch][: layer + 1]
            self.calls[batch] = [*before, *(call for _, call in calls[layer + 1 :])]  # they can hold this output
        self.hidden[batch] = output

    @contextlib.contextmanager
    def _choosing(self, batch: int) -> Iterator[None]:
        """Context: record by which scores a detector chooses its queries in a batch, or replace them by the leader's.

        Otherwise the same row of both models would belong to different places of the image.
        """
        if not (path := self.bound.spec.query_scores):
            yield
            return

        def hook(module: nn.Module, args: tuple, scores: Tensor) -> Tensor | None:
            if self._leader is not None:
                return self._leader._scores[batch].to(scores.device)
            if batch == len(self._scores):
                self._scores.append(scores)
            else:
                self._scores[batch] = scores
            return None

        handle = self._base.get_submodule(path).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _skipped(self, outputs: Mapping[int, Tensor] | None = None) -> Iterator[list[tuple[Tensor, Call]]]:
        """Context: layers return their hidden state unchanged, and the arguments of their calls are listed.

        Args:
            outputs: outputs, by a layer's number, to return in place of the hidden state.
        """
        calls: list[tuple[Tensor, Call]] = []
        first = self.layers[0].forward

        def skip(*args, **kwargs) -> Tensor | tuple[Tensor | None, ...]:
            if self._in_tuple is None:
                # Some models unpack what a layer returns. One real call shows it, and after that no layer has to run.
                whole = first(*args, **kwargs)
                self._in_tuple = len(whole) if isinstance(whole, tuple) else 0
            if not args:
                args = (kwargs.pop("hidden_states"),)
            calls.append((args[0], (args[1:], kwargs)))
            # Layers run in order, so the place of a call in the list is the number of its layer.
            output = (outputs or {}).get(len(calls) - 1, args[0])
            return (output, *[None] * (self._in_tuple - 1)) if self._in_tuple else output

        with restoring(self.layers):
            for layer in self.layers:
                layer.forward = skip
            yield calls


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
