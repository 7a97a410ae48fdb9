"""Second moments for the least squares of a map that writes into the residual stream.

`Sums` are the moments of its inputs and of the errors of its output. They add up over any number of batches, in
float64, and memory does not grow with the number of batches. `stream_factors` gives G = E[g gᵀ], the second moment of
the loss's gradient at each map's output. It converts a squared error of the output into an increase of the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..errors import HfDmsError
from ..gating.places import masked_inputs
from ..masked_ops import of_units
from .layerwise import LayerWalk, layers_of
from .shelf import Shelf
from .stream import StreamModules, added_otherwise, slope, unfolded

Key = tuple[int, str]  # a layer, and the path of a map inside it


@dataclass(frozen=True)
class Writer:
    """A map that writes into the stream, with the units that it reads.

    Attributes:
        path: path of the map inside a layer.
        dim: the pruned dim of its inputs.
        units: the inputs that belong to each unit, `[units, inputs of a unit]` int64.
    """

    path: str
    dim: str
    units: Tensor


def writers(bound: BoundSpec, places: StreamModules, dims: Iterable[str]) -> list[Writer]:
    """The maps that write into the stream and read a pruned dim, in the order in which they run.

    Raises:
        ValueError: a map that does not write into the stream reads one of the dims, or no map does.
    """
    found, inside = {}, f"{bound.layers_path}.0."
    for name in dims:
        readers = [(path, span) for path, _, span in masked_inputs(bound, name) if path.startswith(inside)]
        if beside := [path for path, span in readers if span.start or span.rest]:
            raise HfDmsError(
                f"Least squares cannot choose units of '{name}' of a {bound.spec.model_type}: {beside[0]} reads other "
                "units beside them. Name other dims in dms.prune, or choose by another strategy."
            )
        for path, span in readers:
            # Inputs are numbered as on the axis; row u lists those of unit u.
            inputs = of_units(torch.arange(span.before * span.units * span.after), span)
            path = path.removeprefix(inside)
            found[path] = Writer(path, name, inputs.movedim(1, 0).reshape(span.units, -1))
        others = [path for path, _ in readers if path.removeprefix(inside) not in places.writes]
        if others or not readers:
            raise HfDmsError(
                f"Least squares cannot choose units of '{name}' of a {bound.spec.model_type}: "
                + (
                    f"{others[0]} reads it and does not write into the residual stream."
                    if others
                    else "no map reads it."
                )
                + " Name other dims, as prune: [mlp]."
            )
    return [found[path] for path in places.writes if path in found]


# ---- sums ------------------------------------------------------------------------------------------------------------
@dataclass
class Sums:
    """Second moments of a map over weighted positions. A bias counts as one more input, which is always 1.

    Attributes:
        gram: AᵀDA, A the inputs `[positions, inputs]` and D the weights of the positions: `[inputs, inputs]` float64.
        moment: AᵀDR, R the target minus the output: `[inputs, outputs]` float64.
        missing: the weighted sum of squares of R, a float64 scalar.
        total: the sum of the weights, a float64 scalar.
    """

    gram: Tensor
    moment: Tensor
    missing: Tensor
    total: Tensor

    @classmethod
    def of(cls, *modules: Any) -> Sums:
        """Empty sums for linear maps or convolutions of the same inputs, those of one position for a convolution."""
        module, outputs = modules[0], sum(len(each.weight) for each in modules)
        width = module.weight[0].numel() + (module.bias is not None)
        shapes: list[list[int]] = [[width, width], [width, outputs], [], []]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=module.weight.device) for shape in shapes))

    def add_(self, inputs: Tensor, missing: Tensor, weights: Tensor | None = None) -> None:
        """Add positions.

        Args:
            inputs: inputs of the map, `[positions, inputs]`.
            missing: R, the target minus the output, `[positions, outputs]`.
            weights: weights of the positions, `[positions]`. Default: 1.
        """
        # Products in float32 (or wider inputs' precision), sums in float64: a float64 product would take twice the time
        # and memory, and rounding accumulates only in the sum over batches.
        inputs, missing = widened(inputs), widened(missing)
        weights = inputs.new_ones(len(inputs)) if weights is None else weights
        if len(self.gram) > inputs.shape[1]:
            inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
        # `[inputs, positions]`; both products below share it.
        weighted = (inputs * weights[:, None]).to(inputs.dtype).T
        self.gram += weighted @ inputs
        self.moment += weighted @ missing
        self.missing += (missing.double().square().sum(1) * weights).sum()
        self.total += weights.double().sum()

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.moment + other.moment,
            self.missing + other.missing,
            self.total + other.total,
        )

    def to(self, dtype: torch.dtype) -> Sums:
        """The same in another precision."""
        return Sums(*(tensor.to(dtype) for tensor in (self.gram, self.moment, self.missing, self.total)))


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least, the precision in which the products of a batch are computed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def with_bias(module: Any) -> Tensor:
    """The weights of a map, `[inputs, outputs]` float64. A bias is the last input."""
    weight = module.weight.detach().flatten(1).double().T
    return weight if module.bias is None else torch.cat([weight, module.bias.detach().double()[None]])


@torch.no_grad()
def collect_(
    sums: Sequence[Sums],
    student: LayerWalk,
    places: StreamModules,
    layer: int,
    path: str,
    targets: Shelf,
    masks: Sequence[Tensor | None],
) -> None:
    """Run every batch up to a map of a layer, and add the errors of its output to the sums.

    The weight of a position is 1 / mean square of the target stream: a norm reads the stream, so only the error
    relative to it matters. Without these weights, a few positions with a huge stream (the first token of a Llama) would
    dominate. Where no norm over units reads the stream (ResNet), all positions weigh the same.

    Where an output z is scaled or normalised before it is added, as rows · channels · z (`slope`), the error R of the
    stream becomes R / (rows · channels) of the output. Its weight is then multiplied by rows², which leaves the error
    of the stream as the quantity that is minimised. For a norm this holds to first order, because rows depend on z.

    Args:
        sums: one or more sums; batch i is added to number i modulo their number.
        student: the model that is refitted, in front of the layer.
        places: where its layers write.
        layer: the student's layer.
        path: path of the map inside the layer.
        targets: per batch, the target stream after the map, `[..., hidden]`.
        masks: per batch its attention mask `[batch, tokens]`, None if every position counts.
    """
    block = student.layers[layer]
    for number, mask in enumerate(masks):
        recorder = student.run(layer, number, places, until=path)
        target = targets[number].to(recorder.sums[path].device)
        counts = positions(mask, target)
        # A batch of padding alone has no position to fit on.
        if not counts.any():
            continue
        aim, found = widened(target[counts]), recorder.sums[path][counts]
        inputs = unfolded(block.get_submodule(path), recorder.inputs[path])[counts]
        missing, weights = aim - widened(found), position_weights(aim, places.relative)
        if places.behind or places.channels or places.scale != 1:
            run = recorder.outputs[path][counts], recorder.added[path][counts]
            rows, channels = slope(block, places, path, *run) or added_otherwise(path)
            # A channel with factor 0 cannot reach the stream, whatever its map writes. A row of factor 0 is a position
            # at which a map in front of a norm writes nothing. Its weight is 0 too.
            factor = rows * channels
            missing = torch.where(factor == 0, 0, missing / factor).to(missing.dtype)
            weights = weights * rows[:, 0].square()
        sums[number % len(sums)].add_(inputs, missing, weights)


def position_weights(aim: Tensor, relative: bool = True) -> Tensor:
    """1 / mean square of the stream at each position, for `[positions, hidden]`; 0 where it is 0; 1 if not relative."""
    square = aim.square().mean(-1)
    return torch.where(square > 0, 1 / square, 0) if relative else torch.ones_like(square)


def positions(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Which positions of a batch count, by its attention mask if it has one: bool, of hidden's shape without units."""
    if mask is None:
        return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return mask.to(hidden.device).bool()


# ---- gradients -------------------------------------------------------------------------------------------------------
def stream_factors(
    model: PreTrainedModel, bound: BoundSpec, paths: Iterable[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[Key, Tensor]:
    """For each map, the sum of g gᵀ over positions, per term of the loss; g is the gradient at the map's output.

    With these as metric, half the weighted mean squared error of a map estimates the increase of the mean loss. The
    estimate is the quadratic one, with inputs and gradients taken as independent (K-FAC). Weights get no gradient.

    Args:
        model: a model that returns a loss; it runs in evaluation mode and is not modified.
        bound: its architecture.
        paths: paths of the maps inside a layer that write into the stream.
        batches: keyword arguments of forward passes, with `labels`.

    Returns:
        Per layer and path, `[hidden, hidden]` float64.

    Raises:
        ValueError: no batches, or batches without labels.
    """
    layers = layers_of(model, bound)
    factors: dict[Key, Tensor] = {}
    terms = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(_stream_requires_grad(layers[0]))
        for layer, module in enumerate(layers):
            for path in paths:
                hook = module.get_submodule(path).register_forward_hook(_summing(factors, (layer, path)))
                stack.callback(hook.remove)
        for batch in batches:
            batch = send_to_device(batch, model.device)
            if "labels" not in batch:
                raise HfDmsError("The gradient of the loss needs batches with labels, got " + ", ".join(batch) + ".")
            # The loss is a mean over targets. Times their number it is a sum, so batches of any size add up.
            here = num_targets(batch["labels"])
            (model(**batch).loss * here).backward()
            terms += here
    if not terms:
        raise HfDmsError("The gradient of the loss needs at least one batch with labels, got none.")
    return {key: factor / terms for key, factor in factors.items()}


def num_targets(labels: Any) -> int:
    """How many targets a loss is the mean over.

    Args:
        labels: numbers of classes, -100 where there is none; or of a detector, per image its boxes.
    """
    if isinstance(labels, Tensor):
        return int((labels != -100).sum())
    return sum(len(each["boxes"]) for each in labels)


def _summing(factors: dict[Key, Tensor], key: Key) -> Any:
    """A forward hook that adds the g gᵀ of a module's output to the factors."""

    def add(gradient: Tensor) -> None:
        # `[positions, hidden]`. The product in float32, the sum over batches in float64, as in `Sums`.
        rows = widened(gradient.flatten(0, -2))
        factors[key] = factors.get(key, 0) + (rows.T @ rows).double()

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        # A hook on the tensor, not on the module: it sees the gradient of the output itself, whatever comes behind it.
        output.register_hook(add)

    return hook


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context: a model runs in evaluation mode, its parameters get no gradients, and autograd is on."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    for parameter in trains:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for parameter in trains:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _stream_requires_grad(first: nn.Module) -> Iterator[None]:
    """Context: the hidden state in front of the first layer requires a gradient, since no parameter does."""

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    hook = first.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
