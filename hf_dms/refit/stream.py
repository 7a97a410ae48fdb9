"""The residual stream inside a layer: which maps write into it, what their outputs pass before, what it passes itself.

A `StreamRecorder` follows the stream through one run of a layer. Here the units of the stream are on the last axis
of every tensor, whatever the layer has them on: `[batch, tokens, hidden]`, or `[batch, height, width, hidden]` of an
image. Which modules there are follows from the description and from running the layer (layerwise.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.bind import BoundSpec
from ..cut.verify import TOLERANCE

ROUNDS = 4  # of finding rows and channels in turns


@dataclass(frozen=True)
class StreamModules:
    """Modules inside a layer, by their paths.

    Attributes:
        writes: the linear maps and convolutions that write into the stream, in the order in which they run.
        norms: the norms that the stream itself passes, one after each write (BERT); none where a norm is only in front
            of what reads the stream (Llama, ViT).
        behind: the module, if there is one, that a map's output passes before it is added: a norm (Gemma 2 and 3,
            ResNet) or a scale per channel (DINOv2).
        channels: the parameter of the layer, if there is one, that a map's output is multiplied by before it is added
            (ConvNeXt).
        scale: what the outputs of all maps are multiplied by before they are added (Granite).
        ending: the module that the stream passes at the layer's end (the ReLU of a ResNet), if there is one.
        fresh: whether a new stream begins in the layer, to which the maps write everything (where a stage of a ResNet
            begins, with another width).
        relative: whether a norm over units reads the stream, so that errors count relative to it, position by position.
    """

    writes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    behind: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    ending: str | None = None
    fresh: bool = False
    relative: bool = True


def stream_dim(bound: BoundSpec, stack: str | None = None) -> str:
    """The dim of the residual stream of a stack of layers: what a map inside one gives and the layer does not own.

    Args:
        bound: the architecture.
        stack: depth dim of the layers. Default: that of the only stack.
    """
    stack = bound.depth if stack is None else stack
    maps = ((name.endswith(".weight"), param) for name, param in bound.params.items())  # not a table of biases
    axes = (param.axes for is_map, param in maps if is_map and (param.stack, param.layer) == (stack, 0))
    names = (axis[0][0] for axis in axes if len(axis) in (2, 4) and len(axis[0]) == 1)
    return next(name for name in names if bound.spec.dim(name).scope != "layer" and bound.sizes[name] > 1)


def stream_axis(bound: BoundSpec) -> int:
    """The axis of a layer's hidden state that the units of the stream are on, counted from the end."""
    dims = bound.spec.outputs.get("last_hidden_state", "stream").split()
    return next(place for place, dim in enumerate(dims) if dim != "_") - len(dims)


# ---- one run of a layer ----------------------------------------------------------------------------------------------
class Stop(Exception):
    """A layer has run far enough."""


class StreamRecorder:
    """Follows the residual stream through one run of a layer.

    Attributes:
        stream: the stream as it is by now; None before the first write into a new one.
        inputs: per map that has written, its input, as it got it.
        outputs: per map that has written, its output.
        added: per map that has written, what was added to the stream.
        sums: per map that has written, the stream with what it added, before a norm that the stream passes.
        normed: per norm that the stream is said to pass, its input.
        output: what the layer returned, once it has run to its end, its units where the layer has them.
        before_end: the stream in front of the module that it passes at the layer's end; else the output.
    """

    output: Tensor

    def __init__(self, stream: Tensor, until: str | None, axis: int) -> None:
        self.until, self.axis = until, axis
        self.stream: Tensor | None = self.units_last(stream)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.normed: dict[str, Tensor] = {}
        self._ended: Tensor | None = None

    @property
    def before_end(self) -> Tensor:
        return self.units_last(self.output if self._ended is None else self._ended)

    def units_last(self, hidden: Tensor) -> Tensor:
        """A layer's hidden state with the units of the stream on the last axis."""
        return hidden.movedim(self.axis, -1)

    @contextlib.contextmanager
    def on(self, layer: nn.Module, places: StreamModules) -> Iterator[None]:
        """Listen to a layer for a while."""
        if places.fresh:
            self.stream = None
        factors: dict[str, Any] = {path: layer.get_parameter(name) for path, name in places.channels.items()}
        listeners: list[tuple[str, Callable]] = [(path, functools.partial(self._normed, path)) for path in places.norms]
        for path in places.writes:
            factor = factors.get(path, places.scale)
            listeners.append((path, functools.partial(self._wrote, path, path in places.behind, factor)))
        listeners += [(after, functools.partial(self._passed, path)) for path, after in places.behind.items()]
        if places.ending is not None:
            listeners.append((places.ending, self._ends))
        hooks = [layer.get_submodule(path).register_forward_hook(listener) for path, listener in listeners]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _wrote(self, path: str, passes: bool, factor: Any, module: nn.Module, args: tuple, output: Tensor) -> None:
        output = _units_last(module, output)
        self.inputs[path], self.outputs[path] = args[0], output
        if not passes:
            self._add(path, output * factor)

    def _passed(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._add(path, _units_last(module, output))

    def _add(self, path: str, added: Tensor) -> None:
        self.added[path] = added.clone()  # the layer may go on to add to it in place
        self.sums[path] = self.stream = self.added[path] if self.stream is None else self.stream + added
        if path == self.until:
            raise Stop

    def _normed(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.normed[path] = self.units_last(args[0])
        self.stream = self.units_last(output)

    def _ends(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._ended = args[0]


def _units_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """What a map or norm gets or gives, with its units on the last axis: convolutions have them on axis 1."""
    on_axis_1 = isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm))
    return tensor.movedim(1, -1) if on_axis_1 else tensor


def unfolded(module: Any, inputs: Tensor) -> Tensor:
    """What each output of a map is a linear map of.

    Args:
        module: a linear map or a convolution.
        inputs: what it gets, `[..., inputs]` or `[batch, inputs, height, width]`.

    Returns:
        `[..., inputs]` as given, or `[batch, output height, output width, inputs · kernel height · kernel width]` in
        the order of the convolution's weights.
    """
    if not isinstance(module, nn.Conv2d):
        return inputs
    if module.kernel_size == (1, 1) and not any(module.padding):
        height, width = module.stride
        return inputs[:, :, ::height, ::width].movedim(1, -1)
    options: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
    columns = nn.functional.unfold(inputs, *options)
    sizes = zip(inputs.shape[2:], *options)
    places = [(size + 2 * room - gap * (kernel - 1) - 1) // step + 1 for size, kernel, gap, room, step in sizes]
    return columns.unflatten(-1, places).movedim(1, -1)


# ---- how what is added follows a map's output ------------------------------------------------------------------------
Slope = tuple[Tensor, Tensor]  # rows `[..., 1]` and channels `[hidden]`, float64


def slope(layer: nn.Module, places: StreamModules, path: str, output: Tensor, added: Tensor) -> Slope | None:
    """How what is added to the stream follows a map's output z: added = rows · channels · z + constants.

    Args:
        layer: the layer, in evaluation mode, in which a batch norm is such a map.
        places: where it writes.
        path: of the map.
        output: z, `[..., hidden]`.
        added: of the same shape.

    Returns:
        Rows and channels; None if it does not follow it like this.
    """
    norm: Any = layer.get_submodule(places.behind[path]) if path in places.behind else None
    channels: Tensor
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        channels = batch_norm_slope(norm)
    elif path in places.channels:
        channels = layer.get_parameter(places.channels[path]).double()
    else:
        return slope_of(output, added)
    return torch.ones_like(output[..., :1], dtype=torch.float64), channels


def batch_norm_slope(norm: Any) -> Tensor:
    """What a batch norm in evaluation mode multiplies its units by, `[units]` float64."""
    return norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()


def slope_of(output: Tensor, added: Tensor) -> Slope | None:
    """How what is added to the stream follows a map's output z, from a run: added = rows · channels · z, elementwise.

    For a scale, rows are 1; for a norm without a mean (RMSNorm), 1 / root mean square of each position.

    Args:
        output: z, `[..., hidden]`.
        added: of the same shape.

    Returns:
        Rows and channels; None if it does not follow it like this.
    """
    z, to = output.double().flatten(0, -2), added.double().flatten(0, -2)
    rows = torch.ones_like(z[:, :1])
    for attempt in range(ROUNDS + 1):
        channels = _factor(z * rows, to, 0)
        if same(added, (rows * channels * z).view_as(added).to(added.dtype)):
            return rows.view(*output.shape[:-1], 1), channels[0]
        inverse = z.square().mean(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny).rsqrt()
        rows = inverse if attempt == 0 else _factor(z * channels, to, 1)  # the norm's epsilon makes it a little less
    return None


def _factor(tensor: Tensor, to: Tensor, dim: int) -> Tensor:
    """By how much a tensor comes closest to another one, a number along a dim."""
    square = tensor.square().sum(dim, keepdim=True)
    return (tensor * to).sum(dim, keepdim=True) / square.clamp(min=torch.finfo(square.dtype).tiny)


def same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding only."""
    if tensor.shape != other.shape:
        return False
    difference = (tensor.double() - other.double()).abs().max()
    return bool(difference <= TOLERANCE[tensor.dtype] * other.double().abs().max())
