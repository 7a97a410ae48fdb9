"""A model's layers, run one by one, with their inputs and the outputs that they add to the residual stream.

repair.py goes through a dense and a cut model with it. writes.py finds where a layer writes into the stream.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.axes import terms
from ..archs.bind import BoundSpec
from ..archs.restoring import restoring
from .shelf import Shelf
from .stream import (
    Stop,
    StreamModules,
    StreamRecorder,
    added_otherwise,
    check_streams,
    put_in_order,
    stream_axis,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def layers_of(model: PreTrainedModel, bound: BoundSpec, stack: str | None = None) -> list[nn.Module]:
    """The layers of a model, or of a model cut from it: of its only stack, or of the stack with this depth dim."""
    base: Any = model.base_model
    return list(base.get_submodule(bound.spec.stacks[bound.depth if stack is None else stack]).children())


class LayerWalk:
    """A model's layers (of all its stacks, in order), and the state of every batch on its way through them.

    Attributes:
        bound: the architecture.
        layers: the layers.
        places: for each layer, the depth dim of its stack and its index there.
        calls: per batch and layer, the arguments of the layer's call without the hidden state.
        hidden: per batch, the hidden state in front of the next layer, in the layer's own form.
        found: results of `find_stream_modules` (writes.py), by what they depend on.

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
        self.found: dict[Hashable, StreamModules] = {}
        self._axis = stream_axis(bound)
        self._inputs = Shelf(offload)  # inputs of the model, to run the modules between two stacks or chained layers
        self._done = Shelf(offload)  # per batch, by a layer's number, what it returned, if that matters to later calls
        # Where a map outside of the stacks reads two streams one after the other, one of them goes past a stack.
        outside = [axis for param in bound.params.values() if param.stack is None for axis in param.axes]
        self._all_matter = bool(bound.spec.chained) or any(len(terms(axis)) > 1 for axis in outside)
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
            if self._all_matter:
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
