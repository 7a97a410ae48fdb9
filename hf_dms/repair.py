"""Repair: least squares on the linear maps that write into the residual stream of a cut model, without training.

A cut leaves the remaining weights as they were. Layer after layer, each map that writes into the stream (`o_proj` and
`down_proj` of a Llama, found from the description) gets the weight that brings the stream closest to the dense model's.
With A `[tokens, inputs]` the map's inputs in the cut model, as repaired so far, and R `[tokens, hidden]` what the
stream lacks after it (the dense one minus the cut one, on the kept hidden units), its change is ridge regression:

    ΔWᵀ = (AᵀA + ridge·mean(diag AᵀA)·I)⁻¹ AᵀR

so a cut that changes nothing is left as it is. The last map of a layer aims past the dropped layers that follow. A bias
is one more input, always 1. Nothing else of the model moves: norms, embeddings and the other maps stay.

Both models walk side by side, one layer at a time. Memory: the hidden states of all batches for both models and one
layer's targets; never the activations of all layers, never a second copy of a model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layouts import Plan, kept_units
from .masking import has_gates
from .spec import BoundSpec
from .verify import TOLERANCE

# What norms add to the mean square that they divide by, so that a position that is nearly 0 does not count for all.
NORM_EPSILON = 1e-6

Batches = Sequence[Mapping[str, Tensor]]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def repair_(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    bound: BoundSpec,
    plan: Plan,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    ridge: float = 0.01,
    weighted: bool = False,
) -> None:
    """Bring the residual stream of a cut model back to the dense one's, in place.

    Args:
        pruned: the cut model, on one device.
        dense: the model it was cut from, without gates; it is left as it was.
        bound: the dense model's architecture.
        plan: the units that were kept, `slicing.plan_of` the model with gates.
        batches: keyword arguments of forward passes; all are held at once. Positions where an `attention_mask`
            `[batch, tokens]` is 0 do not count; labels are left out.
        ridge: how strongly a weight is held back, relative to the mean square of its inputs.

    Raises:
        ValueError: no batches, a plan of another cut, activations that are not finite, or an architecture whose maps
            do not write to the stream as a Llama's or as a BERT's do.
    """
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    _check(pruned, dense, batches, ridge)
    stream = stream_dim(bound)
    units = kept_units(plan, stream, None, bound.sizes[stream])
    kept_layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    with _evaluating(dense), _evaluating(pruned):
        teacher, student = _Walk(dense, bound, batches), _Walk(pruned, bound, batches)
        _check_plan("dense", teacher, bound.num_layers, bound.sizes[stream])
        _check_plan("pruned", student, len(kept_layers), len(units))
        places = _places(teacher, bound)
        for layer in range(kept_layers[0]):
            teacher.advance(layer)
        for position, layer in enumerate(kept_layers):
            end = kept_layers[position + 1] if position + 1 < len(kept_layers) else bound.num_layers
            targets = _targets(teacher, places, range(layer, end), units)
            for path in places.writes:
                target = [batch.pop(path).to(pruned.device) for batch in targets]
                gram, moment = _normal_equations(student, places, position, path, target, batches, weighted)
                _update_(student.layers[position].get_submodule(path), gram, moment, ridge, f"{path} of layer {layer}")
            student.advance(position)


# ---- where a layer writes, derived from the description and from running one -----------------------------------------
@dataclass(frozen=True)
class _Places:
    """Modules inside a layer, by their paths.

    Attributes:
        writes: the linear maps that write into the residual stream, in the order in which they run.
        norms: the norms that the stream itself passes, one after each write (BERT); none where a norm is only in front
            of what reads the stream (Llama, ViT).
    """

    writes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def stream_dim(bound: BoundSpec) -> str:
    """The dim of the residual stream: that of the vectors inside a layer which belong to the model as a whole."""
    axes = (param.axes for param in bound.params.values() if param.layer == 0)
    names = (axis[0][0] for axis in axes if len(axis) == 1 and len(axis[0]) == 1)
    return next(name for name in names if bound.spec.dim(name).scope == "model")


def _places(walk: _Walk, bound: BoundSpec) -> _Places:
    """Run the first layer to see how its maps write into the stream.

    Raises:
        ValueError: neither as a Llama's nor as a BERT's do.
    """
    inside, stream = f"{bound.layers_path}.0.", (stream_dim(bound),)
    modules: dict[int, list[str]] = {1: [], 2: []}
    for name, param in bound.params.items():
        if param.layer == 0 and name.endswith(".weight") and param.axes[0] == stream and len(param.axes) in modules:
            modules[len(param.axes)].append(name.removeprefix(inside).removesuffix(".weight"))
    writes, norms = tuple(modules[2]), tuple(modules[1])
    for places in (_Places(writes), _Places(writes, norms)):
        recorder = walk.run(0, 0, places)
        if recorder.consistent and _same(recorder.output, recorder.stream):
            return _Places(tuple(recorder.sums), places.norms)
    raise ValueError(
        f"repair: what {', '.join(writes)} of a {bound.spec.model_type} layer write is not added to the residual "
        "stream as it is, or not everything that is added comes from them. This architecture cannot be repaired."
    )


def _same(tensor: Tensor, other: Tensor) -> bool:
    difference = (tensor.double() - other.double()).abs().max()
    return bool(difference <= TOLERANCE[tensor.dtype] * other.double().abs().max())


class _Stop(Exception):
    """A layer has run far enough."""


class _Recorder:
    """Follows the residual stream through one run of a layer.

    Attributes:
        stream: the stream as it is by now.
        inputs: per map that has written, its input.
        sums: per map that has written, the stream with what it wrote, before a norm that the stream passes.
        consistent: whether every norm that the stream is said to pass was given it.
        output: the layer's output, if it ran to its end.
    """

    def __init__(self, stream: Tensor, until: str | None) -> None:
        self.stream, self.until = stream, until
        self.inputs: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.consistent = True
        self.output = stream

    @contextlib.contextmanager
    def on(self, layer: nn.Module, places: _Places) -> Iterator[None]:
        """Listen to a layer for a while."""
        hooks = [layer.get_submodule(path).register_forward_hook(self._normed) for path in places.norms]
        wrote = {path: functools.partial(self._wrote, path) for path in places.writes}
        hooks += [layer.get_submodule(path).register_forward_hook(hook) for path, hook in wrote.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _wrote(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.inputs[path] = args[0]
        self.sums[path] = self.stream = self.stream + output
        if path == self.until:
            raise _Stop

    def _normed(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.consistent &= _same(args[0], self.stream)
        self.stream = output


# ---- both models, layer by layer -------------------------------------------------------------------------------------
class _Walk:
    """A model's layers, and every batch on its way through them.

    Attributes:
        layers: the layers.
        calls: per batch and layer, what the model calls the layer with beside the hidden state.
        hidden: per batch, the hidden state `[batch, tokens, hidden]` in front of the layer that comes next.
    """

    def __init__(self, model: PreTrainedModel, bound: BoundSpec, batches: Batches) -> None:
        base: Any = model.base_model
        self.layers: list[nn.Module] = list(base.get_submodule(bound.spec.layers).children())
        self.calls: list[list[Call]] = []
        self.hidden: list[Tensor] = []
        options = {} if bound.spec.cache is None else {"use_cache": False}
        for batch in batches:
            with _skipped(self.layers) as calls:
                base(**{name: value.to(model.device) for name, value in batch.items()}, **options)
            self.hidden.append(calls[0][0])
            self.calls.append([call for _, call in calls])

    def run(self, layer: int, batch: int, places: _Places, until: str | None = None) -> _Recorder:
        """Run a layer on a batch, no further than to what the map `until` writes."""
        args, kwargs = self.calls[batch][layer]
        recorder = _Recorder(self.hidden[batch], until)
        with contextlib.suppress(_Stop), recorder.on(self.layers[layer], places):
            output = self.layers[layer](self.hidden[batch], *args, **kwargs)
            recorder.output = output[0] if isinstance(output, tuple) else output
        return recorder

    def advance(self, layer: int) -> None:
        """Let every batch pass a layer."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(layer, batch, _Places()).output


@contextlib.contextmanager
def _skipped(layers: list[nn.Module]) -> Iterator[list[tuple[Tensor, Call]]]:
    """Let layers return their hidden state as it is for a while, and list what they are called with."""
    calls: list[tuple[Tensor, Call]] = []

    def skip(*args, **kwargs) -> Tensor:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        calls.append((args[0], (args[1:], kwargs)))
        return args[0]

    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = skip
    try:
        yield calls
    finally:
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _targets(teacher: _Walk, places: _Places, layers: range, units: Tensor) -> list[dict[str, Tensor]]:
    """Let the dense model pass a kept layer and the dropped ones that follow it.

    Returns:
        Per batch and map, what the stream should be after it `[batch, tokens, kept hidden units]`: the dense one after
        the same map, for a layer's last map after the last one of these layers.
    """
    targets, units = [], units.to(teacher.hidden[0].device)
    for batch in range(len(teacher.hidden)):
        for layer in layers:
            recorder = teacher.run(layer, batch, places)
            teacher.hidden[batch] = recorder.output
            if layer == layers[0]:
                sums = recorder.sums
        sums |= {places.writes[-1]: recorder.sums[places.writes[-1]]}
        targets.append({path: tensor.index_select(-1, units) for path, tensor in sums.items()})
    return targets


# ---- least squares ---------------------------------------------------------------------------------------------------
def _normal_equations(
    student: _Walk, places: _Places, layer: int, path: str, targets: list[Tensor], batches: Batches, weighted
) -> tuple[Tensor, Tensor]:
    """AᵀA `[inputs, inputs]` and AᵀR `[inputs, hidden]` of a map, in float64: sums over all positions that count."""
    module: Any = student.layers[layer].get_submodule(path)
    width, hidden = module.in_features + (module.bias is not None), module.out_features
    gram = torch.zeros(width, width, dtype=torch.float64, device=module.weight.device)
    moment = torch.zeros(width, hidden, dtype=torch.float64, device=module.weight.device)
    for number, (target, batch) in enumerate(zip(targets, batches)):
        recorder = student.run(layer, number, places, until=path)
        counts = _positions(batch, target)
        wanted, found, inputs = (_wide(t[counts]) for t in (target, recorder.sums[path], recorder.inputs[path]))
        if module.bias is not None:
            inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
        weight = (wanted.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt() if weighted else 1
        gram += (weight * inputs).T @ (weight * inputs)
        moment += (weight * inputs).T @ (weight * (wanted - found))
    return gram, moment


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: what a batch's sums are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positions(batch: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Which positions of a batch count, `[batch, tokens]` bool."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.to(hidden.device).bool()


def _update_(module: Any, gram: Tensor, moment: Tensor, ridge: float, name: str) -> None:
    """Add (AᵀA + ridge·mean(diag AᵀA)·I)⁻¹ AᵀR to a linear map; its bias is the last input, which the mean leaves out.

    Raises:
        ValueError: the sums are not finite, or not positive definite.
    """
    width = module.in_features
    damping = (ridge * gram.diagonal()[:width].mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve(moment, factor).T
    if failed or not change.isfinite().all():
        raise ValueError(
            f"repair: the least squares of {name} have no finite solution at ridge {ridge}. Raise it; if that does not "
            "help, the activations of the model on these batches are not finite: check the data, or use a wider dtype."
        )
    module.weight.copy_(module.weight.double() + change[:, :width])
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + change[:, width])


def _check(pruned: PreTrainedModel, dense: PreTrainedModel, batches: Batches, ridge: float) -> None:
    if not batches:
        raise ValueError("repair needs at least one batch, got none.")
    for batch in batches:
        if (mask := batch.get("attention_mask")) is not None and mask.dim() != 2:
            raise ValueError(
                f"repair: the attention_mask of a batch has shape {tuple(mask.shape)}, expected [batch, tokens]."
            )
    if not ridge > 0:
        raise ValueError(f"repair: ridge must be positive, got {ridge}. 0.01 is the default.")
    for name, model in (("pruned", pruned), ("dense", dense)):
        if has_gates(model):
            raise ValueError(f"repair: the {name} model has gates. Take them off with hf_dms.detach_(model) first.")


def _check_plan(name: str, walk: _Walk, num_layers: int, width: int) -> None:
    found = len(walk.layers), walk.hidden[0].shape[-1]
    if found != (num_layers, width):
        raise ValueError(
            f"repair: the {name} model has {found[0]} layers and a residual stream of {found[1]}, but by the plan and "
            f"the description it has {num_layers} and {width}. Give the plan that this model was cut by, and the "
            "model and description that the plan was made for."
        )
