"""A model's layers, run one by one: what each is called with, and what its maps write into the residual stream.

What repair.py walks a dense and a cut model with. Where a layer writes is derived from the description, and how (is the
sum normalised or only what a block reads of it?) from running one; nothing here knows a module's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.restoring import restoring
from ..cut.verify import TOLERANCE
from ..errors import HfDmsError
from .shelf import Shelf

SAME_SCALE = 1e-2  # by how much two scales that are one may differ in a run, relative
ROUNDS = 4  # of finding rows and channels in turns

Call = tuple[tuple[Any, ...], dict[str, Any]]


# ---- where a layer writes, derived from the description and from running one -----------------------------------------
@dataclass(frozen=True)
class StreamModules:
    """Modules inside a layer, by their paths.

    Attributes:
        writes: the linear maps that write into the residual stream, in the order in which they run.
        norms: the norms that the stream itself passes, one after each write (BERT); none where a norm is only in front
            of what reads the stream (Llama, ViT).
        behind: the module, if there is one, that a map's output passes before it is added: a norm (Gemma 2 and 3) or a
            scale per channel (DINOv2).
        scale: what the outputs of all maps are multiplied by before they are added (Granite).
    """

    writes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    behind: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0


def stream_dim(bound: BoundSpec) -> str:
    """The dim of the residual stream: what a linear map inside a layer gives and the layer does not own."""
    axes = (param.axes for param in bound.params.values() if param.layer == 0)
    names = (axis[0][0] for axis in axes if len(axis) == 2 and len(axis[0]) == 1)
    return next(name for name in names if bound.spec.dim(name).scope != "layer")


def layers_of(model: PreTrainedModel, bound: BoundSpec) -> list[nn.Module]:
    """The layers of a model, or of one cut from it."""
    base: Any = model.base_model
    return list(base.get_submodule(bound.spec.stacks[bound.depth]).children())


def find_stream_modules(walk: LayerWalk, bound: BoundSpec) -> StreamModules:
    """Run the first layer to see how its maps write into the stream.

    Raises:
        ValueError: the stream passes more than a norm, or an output more than a norm without a mean or a scale.
    """
    inside, stream = f"{bound.layers_path}.0.", (stream_dim(bound),)
    modules: dict[int, list[str]] = {1: [], 2: []}
    for name, param in bound.params.items():
        path, _, kind = name.removeprefix(inside).rpartition(".")
        if param.layer == 0 and param.axes[0] == stream and len(param.axes) in modules and kind != "bias":
            modules[len(param.axes)].append(path)
    writes, vectors = tuple(modules[2]), tuple(modules[1])
    seen = walk.run(0, 0, StreamModules(writes, vectors))
    behind = {
        path: vector
        for path, output in seen.outputs.items()
        for vector, normed in seen.normed.items()
        if normed.shape == output.shape and bool((normed == output).all())
    }
    for places in (
        StreamModules(writes),
        StreamModules(writes, vectors),
        StreamModules(writes, behind=behind),
        StreamModules(writes, scale=_common_scale(walk.run(0, 0, StreamModules(writes)))),
    ):
        if _as_said(recorder := walk.run(0, 0, places)):
            return dataclasses.replace(places, writes=tuple(recorder.sums))
    raise HfDmsError(
        f"repair: what {', '.join(writes)} of a {bound.spec.model_type} layer write is not added to the residual "
        "stream as it is, scaled or normalised, or not everything that is added comes from them. This architecture "
        "cannot be repaired."
    )


def _as_said(recorder: StreamRecorder) -> bool:
    """Whether a run of a layer shows the stream that the recorder followed."""
    passes = all(
        _same(norm_input, total) for norm_input, total in zip(recorder.normed.values(), recorder.sums.values())
    )
    if not recorder.sums or not passes or not _same(recorder.output, recorder.stream):
        return False
    return all(slope_of(output, recorder.added[path]) is not None for path, output in recorder.outputs.items())


def _common_scale(run: StreamRecorder) -> float:
    """The one factor with which the maps' outputs make what a layer adds to the stream; nan if theirs differ."""
    outputs = torch.stack([output.double().flatten() for output in run.outputs.values()], dim=1)
    added = run.output.double().flatten() - (run.stream.double().flatten() - outputs.sum(1))
    if not added.isfinite().all() or not outputs.isfinite().all():
        return math.nan
    scales = torch.linalg.lstsq(outputs, added[:, None]).solution[:, 0]
    return float(scales[-1]) if bool((scales - scales[-1]).abs().max() < SAME_SCALE * scales.abs().max()) else math.nan


def slope_of(output: Tensor, added: Tensor) -> tuple[Tensor, Tensor] | None:
    """How what is added to the stream follows a map's output z: added = rows · channels · z, elementwise.

    For a scale, rows are 1; for a norm without a mean (RMSNorm), 1 / root mean square of each position.

    Args:
        output: z, `[..., hidden]`.
        added: of the same shape.

    Returns:
        Rows `[..., 1]` and channels `[hidden]`, float64; None if it does not follow it like this.
    """
    z, to = output.double().flatten(0, -2), added.double().flatten(0, -2)
    rows = torch.ones_like(z[:, :1])
    for attempt in range(ROUNDS + 1):
        channels = _factor(z * rows, to, 0)
        if _same(added, (rows * channels * z).view_as(added).to(added.dtype)):
            return rows.view(*output.shape[:-1], 1), channels[0]
        inverse = z.square().mean(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny).rsqrt()
        rows = inverse if attempt == 0 else _factor(z * channels, to, 1)  # the norm's epsilon makes it a little less
    return None


def _factor(tensor: Tensor, to: Tensor, dim: int) -> Tensor:
    """By how much a tensor comes closest to another one, a number along a dim."""
    square = tensor.square().sum(dim, keepdim=True)
    return (tensor * to).sum(dim, keepdim=True) / square.clamp(min=torch.finfo(square.dtype).tiny)


def _same(tensor: Tensor, other: Tensor) -> bool:
    difference = (tensor.double() - other.double()).abs().max()
    return bool(difference <= TOLERANCE[tensor.dtype] * other.double().abs().max())


class _Stop(Exception):
    """A layer has run far enough."""


class StreamRecorder:
    """Follows the residual stream through one run of a layer.

    Attributes:
        stream: the stream as it is by now.
        inputs: per map that has written, its input.
        outputs: per map that has written, its output.
        added: per map that has written, what was added to the stream.
        sums: per map that has written, the stream with what it added, before a norm that the stream passes.
        normed: per norm that the stream is said to pass, its input.
        output: the layer's output, once it has run to its end.
    """

    output: Tensor

    def __init__(self, stream: Tensor, until: str | None) -> None:
        self.stream, self.until = stream, until
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.normed: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def on(self, layer: nn.Module, places: StreamModules) -> Iterator[None]:
        """Listen to a layer for a while."""
        listeners: list[tuple[str, Callable]] = [(path, functools.partial(self._normed, path)) for path in places.norms]
        listeners += [(path, functools.partial(self._wrote, path, places)) for path in places.writes]
        listeners += [(after, functools.partial(self._passed, path)) for path, after in places.behind.items()]
        hooks = [layer.get_submodule(path).register_forward_hook(listener) for path, listener in listeners]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _wrote(self, path: str, places: StreamModules, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.inputs[path], self.outputs[path] = args[0], output
        if path not in places.behind:
            self._add(path, output if places.scale == 1 else output * places.scale)

    def _passed(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._add(path, output)

    def _add(self, path: str, added: Tensor) -> None:
        self.added[path] = added
        self.sums[path] = self.stream = self.stream + added
        if path == self.until:
            raise _Stop

    def _normed(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.normed[path] = args[0]
        self.stream = output


# ---- layer by layer --------------------------------------------------------------------------------------------------
class LayerWalk:
    """A model's layers, and every batch on its way through them.

    Attributes:
        layers: the layers.
        calls: per batch and layer, what the model calls the layer with beside the hidden state.
        hidden: per batch, the hidden state `[batch, tokens, hidden]` in front of the layer that comes next.

    Args:
        model: the model.
        bound: its architecture.
        batches: keyword arguments of forward passes; they are read once.
        offload: a folder for calls and hidden states. Default: memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bound: BoundSpec,
        batches: Iterable[Mapping[str, Tensor]] = (),
        offload: str | os.PathLike | None = None,
    ) -> None:
        base: Any = model.base_model
        self.layers = layers_of(model, bound)
        self.offload = offload
        self.calls, self.hidden = Shelf(offload), Shelf(offload)
        self._base = base
        self._options = {} if bound.spec.cache is None else {"use_cache": False}
        for batch in batches:
            self.add_(batch)

    def add_(self, batch: Mapping[str, Tensor]) -> None:
        """Put another batch in front of the first layer; labels are left out."""
        device = self._base.device
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        with _skipped(self.layers) as calls:
            self._base(**inputs, **self._options)
        self.hidden.append(calls[0][0])
        self.calls.append([call for _, call in calls])

    def run(self, layer: int, batch: int, places: StreamModules, until: str | None = None) -> StreamRecorder:
        """Run a layer on a batch, no further than to what the map `until` writes."""
        args, kwargs = self.calls[batch][layer]
        hidden = self.hidden[batch]
        recorder = StreamRecorder(hidden, until)
        with contextlib.suppress(_Stop), recorder.on(self.layers[layer], places):
            output = self.layers[layer](hidden, *args, **kwargs)
            recorder.output = output[0] if isinstance(output, tuple) else output
        return recorder

    def advance(self, layer: int) -> None:
        """Let every batch pass a layer."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(layer, batch, StreamModules()).output


def targets_of_layers(teacher: LayerWalk, places: StreamModules, layers: range, units: Tensor) -> dict[str, Shelf]:
    """Let the dense model pass a kept layer and the dropped ones that follow it.

    Returns:
        Per map, for every batch, what the stream should be after it `[batch, tokens, kept hidden units]`: the dense one
        after the same map, for a layer's last map after the last one of these layers.
    """
    targets = {path: Shelf(teacher.offload) for path in places.writes}
    for batch in range(len(teacher.hidden)):
        for layer in layers:
            recorder = teacher.run(layer, batch, places)
            teacher.hidden[batch] = recorder.output
            if layer == layers[0]:
                sums = recorder.sums
        sums |= {places.writes[-1]: recorder.sums[places.writes[-1]]}
        for path, tensor in sums.items():
            targets[path].append(tensor.index_select(-1, units.to(tensor.device)))
    return targets


@contextlib.contextmanager
def _skipped(layers: list[nn.Module]) -> Iterator[list[tuple[Tensor, Call]]]:
    """Let layers return their hidden state as it is for a while, and list what they are called with."""
    calls: list[tuple[Tensor, Call]] = []

    def skip(*args, **kwargs) -> Tensor:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        calls.append((args[0], (args[1:], kwargs)))
        return args[0]

    with restoring(layers):
        for layer in layers:
            layer.forward = skip
        yield calls
