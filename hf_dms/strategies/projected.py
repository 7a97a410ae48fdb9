"""Projected straight-through gates, as in GRASPrune (Wang et al., arXiv 2604.19398).

Each unit has a score s and p = σ(s / τ). At every step the units with the largest p that fit the budget are open and
all others are shut: a hard mask m. The gradient is that of p: z = m + p − p.detach().

As in the paper: the projection to the final budget at every step, by p and not by p per cost; τ = 1.5; Adam at 0.01;
s starts at 0; frozen weights. Different: noise of 1e-3 separates equal scores at the start. The paper then trains
scales 1 + tanh(s')/2 of the kept units, and here least-squares repair takes their place (scaled.py learns scales). Here
the projection ends at the first unit that does not fit; in the paper smaller units may follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gates import Gates
from .allocate import Scores, sizes_of_scores
from .learned import Masks, PerUnit, hard_masks, learned_criterion, learner, straight_through

TAU = 1.5
TIES = 1e-3


class Projected(PerUnit):
    """A score of every unit; see `Relaxation`."""

    rate = 0.01

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates, 0.0)
        for score in self.learned.values():
            # All scores start equal. Without noise, ties break by index, and the first units of each dim would be shut.
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


PROJECTED = learned_criterion(learner(Projected))
