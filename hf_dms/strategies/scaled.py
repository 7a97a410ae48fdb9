"""Deterministic gates that are scales too, after DDP (Huang et al., arXiv 2603.08065).

Each unit is multiplied by a number s of its own, which starts at 1, may exceed it, and is the mask in training and
afterwards alike: nothing is sampled. For the budget a unit counts as s²/(s² + ε²), a soft form of 1[s ≠ 0] that is
sharper the smaller ε, which falls from 1 to 0.1. The units of largest |s| stay, and their s goes into the weights that
read them.

Faithful, as far as the paper's abstract says: masks alone are optimised, deterministic, with a soft surrogate of ℓ0,
and not bounded by 1. Not, or not known: which surrogate; the KL divergence from the dense model beside the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.plain_view import submodule
from ..gates import Gates
from ..gating.attach import gates_of, masked_inputs
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
        dense = 1 + width**2  # so that a model of scales 1 counts as whole
        kept = {name: (dense * soft_count(scale, width)).clamp(max=1) for name, scale in self.learned.items()}
        return pull(self.gates, kept, progress)

    def scores(self) -> Scores:
        return {name: scale.abs() for name, scale in self.learned.items()}


@torch.no_grad()
def fold_(model: PreTrainedModel, scales: Masks) -> None:
    """Multiply the weights that read units by the units' scales, in place.

    Args:
        scales: per dim `[rows, units]`.
    """
    bound = gates_of(model).attachment.bound
    for name, scale in scales.items():
        for path, row, shape in masked_inputs(bound, name):
            weight: Tensor = submodule(model, path).weight  # type: ignore[assignment]
            weight.movedim(1, -1).mul_(scale[row][None, :, None].expand(shape).reshape(-1).to(weight.dtype))


def scaled_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """|s| of every unit; the scales are in the model's weights afterwards."""
    relaxation = Scaled(gates_of(model))
    scores = train_masks(model, relaxation, batches)
    fold_(model, relaxation.learned)
    return scores


SCALED = Criterion(scaled_scores, allocation="global", dims=("layer",), changes_weights=True)
