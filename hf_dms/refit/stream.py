"""The residual stream inside a layer: the maps that write into it, and the modules between those maps and the stream.

A `StreamRecorder` follows the stream through one run of a layer. In all tensors here the units of the stream are on the
last axis, whichever axis the layer uses: `[batch, tokens, hidden]`, or `[batch, height, width, hidden]` for images.
writes.py finds the modules, from the description and by running the layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..archs.bind import BoundSpec
from ..cut.verify import TOLERANCE
from ..errors import HfDmsError

ROUNDS = 4  # `slope_of` finds rows and channels in turns, this many times


@dataclass(frozen=True)
class StreamModules:
    """Modules inside a layer, by their paths.

    Attributes:
        writes: the linear maps and convolutions that write into the stream, in the order in which they run.
        norms: the norms that the stream itself passes, one after each write (BERT). Empty where norms are only in front
            of the modules that read the stream (Llama, ViT).
        behind: by map, the module that its output passes before it is added: a norm (Gemma 2 and 3, ResNet) or a scale
            per channel (DINOv2).
        moved: by map, the first module that gets its output with positions in the order of the stream, where the map
            has them in another order, or more of them (in windows of an image: Swin).
        channels: by map, the parameter of the layer that multiplies its output before it is added (ConvNeXt).
        scale: a number that multiplies the outputs of all maps before they are added (Granite).
        ending: the module that the stream passes at the end of the layer (the ReLU of a ResNet), if there is one.
        fresh: whether a new stream begins in the layer, and its maps write all of it (the first block of a stage of a
            ResNet, which has another width).
        relative: whether a norm over units reads the stream. Errors then count relative to the stream's size at each
            position.
    """

    writes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    behind: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    ending: str | None = None
    fresh: bool = False
    relative: bool = True


def stream_dim(bound: BoundSpec, stack: str | None = None) -> str:
    """The dim of the residual stream of a stack of layers: maps inside a layer write it, but no layer owns it.

    Args:
        bound: the architecture.
        stack: depth dim of the layers. Default: the only stack's.

    Raises:
        HfDmsError: the layers of the stack write streams of different widths.
    """
    if bound.spec.families and isinstance(bound.spec.layers, str):  # one list of blocks, each a stage
        raise HfDmsError(
            f"repair: the blocks of a {bound.spec.model_type} write residual streams of different widths, and least "
            "squares follow one stream through a stack of layers. This architecture cannot be repaired."
        )
    stack = bound.depth if stack is None else stack
    maps = ((name.endswith(".weight"), param) for name, param in bound.params.items())  # not a table of biases
    axes = (param.axes for is_map, param in maps if is_map and (param.stack, param.layer) == (stack, 0))
    names = (axis[0][0] for axis in axes if len(axis) in (2, 4) and len(axis[0]) == 1)
    return next(name for name in names if bound.spec.dim(name).scope != "layer" and bound.sizes[name] > 1)


def check_streams(bound: BoundSpec) -> None:
    """Check that the layers of every stack write one residual stream; see `stream_dim` for the error."""
    for stack in bound.stacks:
        stream_dim(bound, stack)


def stream_axis(bound: BoundSpec) -> int:
    """The axis of a layer's hidden state that holds the units of the stream, counted from the end."""
    # Any word stands for one axis: where the description says nothing, the units are on the last one.
    dims = bound.spec.outputs.get("last_hidden_state", "stream").split()
    place, name = next((place, dim) for place, dim in enumerate(dims) if dim != "_")
    # The output may be made of other units than a stream's. Layers that are not followed by it have theirs last.
    is_stream = name in ("stream", *(stream_dim(bound, stack) for stack in bound.stacks))
    return place - len(dims) if is_stream else -1


# ---- one run of a layer ----------------------------------------------------------------------------------------------
class Stop(Exception):
    """Raised inside a layer to end its run once the map in question has written."""


class StreamRecorder:
    """Follows the residual stream through one run of a layer.

    Attributes:
        stream: the current stream; None before the first write into a new one.
        inputs: by map, its input, with units on the axis where the layer has them, and positions in the stream's order.
        outputs: by map, its output, with positions in the stream's order.
        added: by map, the tensor that was added to the stream.
        sums: by map, the stream after its write, before a norm that the stream passes.
        normed: by norm in `StreamModules.norms`, its input.
        output: the output of the layer, if it has run to its end, with units on the axis where the layer has them.
        before_end: the stream in front of `StreamModules.ending`, or else the output.

    Args:
        stream: the hidden state in front of the layer.
        until: the map after whose write the run stops. None: at the end.
        axis: the axis of the hidden state that holds units, counted from the end.
        orders: by map in `StreamModules.moved`, its positions in the stream's order, see `put_in_order`.
    """

    output: Tensor

    def __init__(self, stream: Tensor, until: str | None, axis: int, orders: Mapping[str, Tensor]) -> None:
        self.until, self.axis, self.orders = until, axis, orders
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
        """Context: record the runs of a layer."""
        if places.fresh:
            self.stream = None
        factors: dict[str, Any] = {path: layer.get_parameter(name) for path, name in places.channels.items()}
        listeners: list[tuple[str, Callable]] = [(path, functools.partial(self._normed, path)) for path in places.norms]
        for path in places.writes:
            factor = factors.get(path, places.scale)
            # What passes another module first is added where that module returns.
            passes = path in places.behind or path in places.moved
            listeners.append((path, functools.partial(self._wrote, path, passes, factor)))
        listeners += [(after, functools.partial(self._passed, path)) for path, after in places.behind.items()]
        listeners += [(after, functools.partial(self._moved, path)) for path, after in places.moved.items()]
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

    def _moved(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        for tensors in (self.inputs, self.outputs):
            rows = tensors[path].flatten(0, -2)[self.orders[path]]
            tensors[path] = rows.view(*output.shape[:-1], rows.shape[-1])
        self._add(path, output)

    def _add(self, path: str, added: Tensor) -> None:
        if self.stream is not None and added.shape != self.stream.shape:
            added_otherwise(path)  # at other positions, which an earlier batch did not show
        self.added[path] = added.clone()  # the layer may add to it in place later
        self.sums[path] = self.stream = self.added[path] if self.stream is None else self.stream + added
        if path == self.until:
            raise Stop

    def _normed(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.normed[path] = self.units_last(args[0])
        self.stream = self.units_last(output)

    def _ends(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._ended = args[0]


@torch.no_grad()
def put_in_order(
    layer: nn.Module, path: str, paths: Iterable[str], shape: torch.Size, run: Callable[[], object]
) -> tuple[str, Tensor] | None:
    """The module that gets a map's output with positions in the order of the stream, and their numbers in the map.

    It is found by a run in which the map's output at each position is the number of the position.

    Args:
        layer: the layer.
        path: path of a linear map inside the layer.
        paths: paths of modules inside the layer; the first to run after the map with an input in `shape` is taken.
        shape: the shape of the stream.
        run: runs the layer.

    Returns:
        Path of the module, and numbers of positions of the map `[positions of the stream]` int64 (the map may have more
        positions); None if there is no such module.
    """
    ran, found = [], list[tuple[str, Tensor]]()

    def number(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ran.append(path)
        numbers = torch.arange(output[..., 0].numel(), dtype=torch.float32, device=output.device)  # exact up to 2^24
        return numbers.view(*output.shape[:-1], 1).expand_as(output)

    def read(after: str, module: nn.Module, args: tuple) -> None:
        if ran and args and isinstance(args[0], Tensor) and args[0].shape == shape:
            found.append((after, args[0][..., 0].long().flatten()))
            raise Stop

    hooks = [layer.get_submodule(path).register_forward_hook(number)]
    hooks += [layer.get_submodule(each).register_forward_pre_hook(functools.partial(read, each)) for each in paths]
    try:
        with contextlib.suppress(Stop):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _units_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """An input or output of a map or norm with its units on the last axis. Convolutions have them on axis 1."""
    on_axis_1 = isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm))
    return tensor.movedim(1, -1) if on_axis_1 else tensor


def unfolded(module: Any, inputs: Tensor) -> Tensor:
    """The inputs of a map in a form in which each output position is a plain linear map of one row.

    Args:
        module: a linear map or a convolution.
        inputs: its input, `[..., inputs]` or `[batch, inputs, height, width]`.

    Returns:
        `[..., inputs]` as given, or `[batch, output height, output width, inputs · kernel height · kernel width]` in
        the order of the convolution's weights.
    """
    if not isinstance(module, nn.Conv2d):
        return inputs
    if module.kernel_size == (1, 1) and not any(module.padding):
        # A kernel of one place reads a view of the inputs, where `unfold` would copy them.
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
    """How a map's output z becomes the tensor that is added to the stream: added = rows · channels · z + constants.

    Args:
        layer: the layer, in evaluation mode. A batch norm is then a factor and a constant for each channel.
        places: where the layer writes.
        path: path of the map inside the layer.
        output: z, `[..., hidden]`.
        added: the added tensor, of the same shape.

    Returns:
        Rows and channels; None if the relation is not of this form.
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
    """The factor by which a batch norm in evaluation mode multiplies each unit, `[units]` float64."""
    return norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()


def slope_of(output: Tensor, added: Tensor) -> Slope | None:
    """Rows and channels with added = rows · channels · z, elementwise, from the tensors of one run.

    For a scale, rows are 1. For a norm without a mean (RMSNorm), they are 1 / root mean square of each position.

    Args:
        output: a map's output z, `[..., hidden]`.
        added: the tensor that was added to the stream, of the same shape.

    Returns:
        Rows and channels; None if the relation is not of this form.
    """
    z, to = output.double().flatten(0, -2), added.double().flatten(0, -2)
    rows = torch.ones_like(z[:, :1])
    # Rows and channels are a product: with one known, the other is a linear fit. They are found in turns.
    for attempt in range(ROUNDS + 1):
        channels = _factor(z * rows, to, 0)
        if same(added, (rows * channels * z).view_as(added).to(added.dtype)):
            return rows.view(*output.shape[:-1], 1), channels[0]
        inverse = z.square().mean(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny).rsqrt()
        # First the formula of an RMS norm; its epsilon makes the true rows slightly smaller, so then they are fitted.
        rows = inverse if attempt == 0 else _factor(z * channels, to, 1)
    return None


def _factor(tensor: Tensor, to: Tensor, dim: int) -> Tensor:
    """The factor that brings a tensor closest to another one, by least squares along a dim."""
    square = tensor.square().sum(dim, keepdim=True)
    return (tensor * to).sum(dim, keepdim=True) / square.clamp(min=torch.finfo(square.dtype).tiny)


def added_otherwise(path: str) -> NoReturn:
    """Raise the error for a map whose output is not added to the stream as `StreamModules` says."""
    raise HfDmsError(
        f"repair: what {path} writes is added to the residual stream in another way than in the first layer, or is not "
        "finite. This architecture cannot be repaired."
    )


def same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding only."""
    if tensor.shape != other.shape:
        return False
    difference = (tensor.double() - other.double()).abs().max()
    # `<=`, so that two tensors of zeros are the same. NaN is the same as nothing.
    return bool(difference <= TOLERANCE[tensor.dtype] * other.double().abs().max())
