"""What all learned strategies share: their own masks on a model with frozen weights, and the training of these masks.

A relaxation (the classes in hard_concrete.py, projected.py, scaled.py, selection.py and topk_variants.py) defines what
is learned, the masks, and the penalty for the budget. At the end it gives each unit a score; sizes, rounding and the
cut follow as for every criterion. Masks are where the search has them: on the inputs of the maps that read a unit, and
on the output that a layer adds to the stream. Unlike those of the search they are plain factors, so that a unit with
mask 0 has a gradient too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.plain_view import submodule
from ..gates import Gates
from ..gating.attach import gates_of
from ..gating.places import masked_inputs, unit_axis
from ..gating.scales import scale_rate
from ..masked_ops import Span, spread
from ..refit.curvature import frozen
from ..resource import Sizes, resource_loss, scheduled_target
from ..topk import topk_mask
from .allocate import Batches, Criterion, Scores, loss_of

Masks = dict[str, Tensor]  # per dim `[rows, units]`


class Relaxation(Protocol):
    """A differentiable stand-in for the choice of units."""

    rate: float  # learning rate of Adam; none was tuned

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that are trained."""

    def masks(self, progress: float) -> Masks:
        """Masks for one forward pass, differentiable in the parameters, at a point of the search in [0, 1)."""

    def penalty(self, progress: float) -> Tensor:
        """The term that the budget adds to the loss, a scalar; called after `masks`."""

    def scores(self) -> Scores:
        """The score of every unit at the end."""


def learner(make: Callable[[Gates], Relaxation]) -> Callable[[PreTrainedModel, Batches], Scores]:
    """The `scores` of a criterion that trains a relaxation, one step per batch, with all weights frozen."""

    def scores(model: PreTrainedModel, batches: Batches) -> Scores:
        return train_masks(model, make(gates_of(model)), batches)

    return scores


def learned_criterion(scores: Callable[[PreTrainedModel, Batches], Scores]) -> Criterion:
    """A criterion that trains masks.

    Args:
        scores: what `learner` returns, or a function of the same kind that calls `train_masks` itself.
    """
    # global: the penalty has weighed what a unit costs already, so scores are not divided by it again.
    return Criterion(scores, allocation="global", dims=("layer", "depth"), learns_masks=True)


def train_masks(model: PreTrainedModel, relaxation: Relaxation, batches: Batches) -> Scores:
    """Train a relaxation, in place.

    Args:
        model: a model with gates; these are open during the training. Their scales (`dms.scales`) are trained too.
        relaxation: see `Relaxation`.
        batches: keyword arguments of forward passes, with labels.

    Returns:
        The score of every unit at the end.
    """
    gates = gates_of(model)
    learned = [[*relaxation.parameters()], [*gates.scales.values()]]
    optimizer = torch.optim.Adam([{"params": tensors, "lr": relaxation.rate} for tensors in learned if tensors])
    rate: Any = gates.attachment.config.with_defaults_for(len(batches)).gate_learning_rate
    with frozen(model), masked_by(model) as masks, _requiring_grad(gates.scales.values()):
        for step, batch in enumerate(batches):
            progress = step / len(batches)
            for group in optimizer.param_groups[1:]:
                group["lr"] = rate * scale_rate(progress)
            masks.update(relaxation.masks(progress))
            loss = loss_of(model, batch) + relaxation.penalty(progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: values.detach().clone() for name, values in relaxation.scores().items()}


@contextlib.contextmanager
def _requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    for tensor in tensors:
        tensor.requires_grad_()
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


@contextlib.contextmanager
def masked_by(model: PreTrainedModel) -> Iterator[Masks]:
    """Context: the units of a model with gates are multiplied by masks. The caller puts these into the yielded dict."""
    gates, masks = gates_of(model), Masks()
    bound, handles = gates.attachment.bound, []
    for name in gates.dims:
        if name in bound.stacks:
            for layer, module in enumerate(submodule(model, bound.stacks[name]).children()):
                # A fixed layer may change width or resolution, so its input cannot stand in for its output.
                if layer not in bound.fixed_layers[name]:
                    hook = _on_residual(masks, name, layer)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for path, row, span in masked_inputs(bound, name):
            inputs = _on_inputs(masks, name, row, span, unit_axis(bound, path))
            handles.append(submodule(model, path).register_forward_pre_hook(inputs))
    # The gates' own masks stay in place, all open: only the masks of the strategy and the gates' scales act.
    gates.rounded = {name: torch.full((dim.rows,), dim.units) for name, dim in gates.dims.items()}
    try:
        yield masks
    finally:
        gates.rounded = None
        for handle in handles:
            handle.remove()


def _on_inputs(masks: Masks, name: str, row: int, span: Span, axis: int) -> Any:
    def hook(module: nn.Module, args: tuple) -> tuple:
        mask = spread(masks[name][row], span, other=1.0)
        masked = args[0].movedim(axis, -1) * mask.to(args[0].dtype)
        return (masked.movedim(-1, axis), *args[1:])

    return hook


def _on_residual(masks: Masks, name: str, layer: int) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        # x + m·(y - x), as in the search (masked_ops.GateResidual).
        mixed = torch.lerp(before, after, masks[name][0, layer].to(after.dtype))
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


def units(gates: Gates, value: float) -> Masks:
    """A trainable number for every unit: per dim `[rows, units]` float32."""
    device = gates.prune_ratio.device
    return {n: torch.full((d.rows, d.units), value, device=device).requires_grad_() for n, d in gates.dims.items()}


class PerUnit:
    """Base of relaxations that learn one number for every unit.

    Args:
        gates: the gates of the model.
        value: start value of every unit.

    Attributes:
        learned: the numbers, per dim `[rows, units]`.
    """

    def __init__(self, gates: Gates, value: float) -> None:
        self.gates, self.learned = gates, units(gates, value)

    def parameters(self) -> Iterable[Tensor]:
        return self.learned.values()


def hard_masks(gates: Gates, sizes: Sizes) -> Masks:
    """Masks of the most important units of every row, as many as sizes give."""
    return {name: topk_mask(gates.importance(name), size.long()) for name, size in sizes.items()}


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def kept_resource(gates: Gates, kept: Masks) -> Tensor:
    """Fraction of the dense resource that is kept, if each unit counts by a number in [0, 1]; differentiable.

    Args:
        gates: the gates of the model.
        kept: how much each unit counts, per dim `[rows, units]`. Units of a depth dim are the layers, each with its own
            widths.
    """
    sizes = gates.dense_sizes() | {name: values.sum(-1) for name, values in kept.items()}
    layers = {stack: kept[stack][0] for stack in gates.cost.stacks if stack in kept}
    return (gates.cost.count(sizes, layers) / gates.dense_resource).float()


def pull(gates: Gates, kept: Masks, progress: float) -> Tensor:
    """The resource loss of the search for masks of any kind: λ·log(r / r_t) above the falling target, 0 below it."""
    schedule = gates.schedule
    target = scheduled_target(schedule.target, progress, schedule.target_ramp, schedule.target_schedule)
    return schedule.resource_weight * resource_loss(kept_resource(gates, kept), target)
