"""Deterministic gates that are scales too, after DDP (Huang et al., arXiv 2603.08065).

Each unit is multiplied by its own number s, which starts at 1 and may exceed 1. It is the mask in training and after
it; nothing is sampled. For the budget a unit counts as s²/(s² + ε²), a soft form of 1[s ≠ 0]. It becomes sharper as ε
falls from 1 to 0.1. The units with the largest |s| stay, and their s is multiplied into the weights that read them.

As in the paper, as far as its abstract tells: only masks are optimised; they are deterministic, have a soft surrogate
of ℓ0, and are not bounded by 1. Different or unknown: which surrogate the paper uses. The KL divergence from the dense
model, which the paper adds to the loss, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.plain_view import submodule
from ..gates import Gates
from ..gating.attach import gates_of
from ..gating.places import masked_inputs
from ..masked_ops import spread
from .allocate import Batches, Criterion, Scores
from .learned import Masks, PerUnit, pull, train_masks

WIDEST, NARROWEST = 1.0, 0.1  # ε at the beginning and at the end


def soft_count(scale: Tensor, width: float) -> Tensor:
    """s²/(s² + ε²) for each scale.

    Example:
        >>> soft_count(torch.tensor([0.0, 0.5, 1.0]), 0.5)
        tensor([0.0000, 0.5000, 0.8000])
    """
    return scale.square() / (scale.square() + width**2)


class Scaled(PerUnit):
    """A scale for every unit; see `Relaxation`."""

    rate = 0.02

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates, 1.0)

    def masks(self, progress: float) -> Masks:
        return self.learned

    def penalty(self, progress: float) -> Tensor:
        width = WIDEST * (NARROWEST / WIDEST) ** progress
        dense = 1 + width**2  # a factor that makes a model with all scales 1 count as the dense one
        # At most 1: a scale above 1 makes a unit louder, not dearer.
        kept = {name: (dense * soft_count(scale, width)).clamp(max=1) for name, scale in self.learned.items()}
        return pull(self.gates, kept, progress)

    def scores(self) -> Scores:
        return {name: scale.abs() for name, scale in self.learned.items()}


@torch.no_grad()
def fold_(model: PreTrainedModel, scales: Masks) -> None:
    """Multiply the weights that read units by the units' scales, in place.

    Args:
        model: a model with gates.
        scales: per dim `[rows, units]`.
    """
    bound = gates_of(model).attachment.bound
    for name, scale in scales.items():
        for path, row, span in masked_inputs(bound, name):
            weight: Tensor = submodule(model, path).weight  # type: ignore[assignment]
            # W (s ∘ x) = (W ∘ s) x: a scale goes into the columns of the maps that read its unit.
            weight.movedim(1, -1).mul_(spread(scale[row], span, other=1.0).to(weight.dtype))


def scaled_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """|s| of every unit. The scales are multiplied into the model's weights."""
    relaxation = Scaled(gates_of(model))
    scores = train_masks(model, relaxation, batches)
    fold_(model, relaxation.learned)
    return scores


SCALED = Criterion(scaled_scores, allocation="global", dims=("layer",), changes_weights=True)
