"""Hard-concrete gates under a Lagrangian, as in CoFi and Sheared-LLaMA.

Each unit has log α. In training its mask is z = clamp(s·(ζ − γ) + γ, 0, 1) with s = σ((log u − log(1 − u) + log α) / β)
and u uniform in (0, 1). The probability of z > 0 is σ(log α − β·log(−γ/ζ)) (Louizos et al., arXiv 1712.01312). With r
the expected share of the resource and t the target, λ₁·(r − t) + λ₂·(r − t)² is added to the loss, and both λ ascend
(CoFi, Xia et al., arXiv 2204.00408; Sheared-LLaMA, arXiv 2310.06694).

As in the papers: the distribution, β = 2/3, γ = −0.1, ζ = 1.1, the min-max, a target that falls. Different: weights are
frozen here, and train in the papers; there is no distillation between layers; as in CoFi one budget holds for the whole
model, where Sheared-LLaMA prescribes the size of each dim; gates start open (log α = 3); all learning rates are 0.1,
untuned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..gates import Gates
from ..resource import scheduled_target
from .allocate import Scores
from .learned import Masks, PerUnit, kept_resource, learned_criterion, learner

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 3.0  # a gate is then open with probability 0.99, so training begins near the dense model
NOISE = 1e-6  # u stays this far from 0 and 1, where its logarithms are infinite


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """z of each unit, in [0, 1], differentiable in log α.

    Example:
        >>> hard_concrete(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.01, 0.5, 0.99]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of each unit.

    Example:
        >>> open_probability(torch.tensor([0.0]))  # 1 / (1 + 11^(-2/3))
        tensor([0.8318])
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


class HardConcrete(PerUnit):
    """log α of every unit, and the two multipliers; see `Relaxation`."""

    rate = 0.1

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates, START)
        self.multipliers = torch.zeros(2, device=gates.prune_ratio.device).requires_grad_()
        self.multipliers.register_hook(lambda gradient: -gradient)  # gradient ascent with the same optimizer

    def parameters(self) -> Iterable[Tensor]:
        return [*super().parameters(), self.multipliers]

    def masks(self, progress: float) -> Masks:
        uniform = {n: torch.empty_like(a).uniform_(NOISE, 1 - NOISE) for n, a in self.learned.items()}
        return {name: hard_concrete(log_alpha, uniform[name]) for name, log_alpha in self.learned.items()}

    def penalty(self, progress: float) -> Tensor:
        schedule = self.gates.schedule
        # The search's own falling target, so that both have the same budget at each step. CoFi's falls linearly.
        target = scheduled_target(schedule.target, progress, schedule.target_ramp, schedule.target_schedule)
        excess = kept_resource(self.gates, {n: open_probability(a) for n, a in self.learned.items()}) - target
        return self.multipliers[0] * excess + self.multipliers[1] * excess.square()

    def scores(self) -> Scores:
        return {name: torch.sigmoid(log_alpha) for name, log_alpha in self.learned.items()}


HARD_CONCRETE = learned_criterion(learner(HardConcrete))
