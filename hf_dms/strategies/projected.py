"""Projected straight-through gates: how GRASPrune chooses structure (Wang et al., arXiv 2604.19398).

Each unit has a score s and p = σ(s / τ). At every step the units of largest p that fit the budget are open and all
others shut, a hard mask m; the gradient is that of p: z = m + p − p.detach().

Faithful: the projection to the final budget at every step, by p and not by p per cost; τ = 1.5, Adam at 0.01, s from 0,
frozen weights. Not: equal scores at the start are told apart by noise of 1e-3; the scales 1 + tanh(s')/2 of what stays,
which are trained afterwards there (least-squares repair takes their place, scaled.py learns scales); a unit that does
not fit ends the projection, while there smaller ones may follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gates import Gates
from .allocate import Criterion, Scores, sizes_of_scores
from .learned import Masks, PerUnit, hard_masks, learner, straight_through

TAU = 1.5
TIES = 1e-3


class Projected(PerUnit):
    """A score of every unit; see `Relaxation`."""

    rate = 0.01

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates, 0.0)
        for score in self.learned.values():
            score.data.add_(TIES * torch.randn_like(score))

    def masks(self, progress: float) -> Masks:
        soft = self.scores()
        with torch.no_grad():
            hard = hard_masks(self.gates, sizes_of_scores(self.gates, soft, "global"))
        return {name: straight_through(hard[name], soft[name]) for name in soft}

    def penalty(self, progress: float) -> Tensor:
        return torch.zeros(())  # the masks keep the budget

    def scores(self) -> Scores:
        return {name: torch.sigmoid(score / TAU) for name, score in self.learned.items()}


PROJECTED = Criterion(learner(Projected), allocation="global", dims=("layer", "depth"))
