"""Two ways of modelling structure to which the DMS paper (arXiv 2405.07194, figure 1a) compares its operator.

- Multiple-element selection: a decision for each unit. `element_selection` follows the ablation in the paper: two
  logits per unit, hard Gumbel-softmax with τ = 0.1 in training and argmax afterwards, with the expected cost in the
  loss. `pas` follows PaS (Li et al., arXiv 2206.01198): one weight per unit, 1[w ≥ ½] with a straight-through gradient,
  no sampling.
- Single-number selection: logits over 16 widths per row, y = Σ_i g_i·(M_i ∘ x) with g = Gumbel-softmax and M_i the
  first k_i units, cost Σ g_i·k_i (FBNetV2, Wan et al., arXiv 2004.05565).

A third way, gradient-estimated top-k, is in topk_variants.py.

All are learned on frozen weights here, with the resource loss and the falling target of the search. (PaS also trains
the weights.) Only the difference of two logits matters, so one logit is learned. Single-number selection needs an order
of the units: that of one-shot Taylor on a quarter of the batches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..gates import Gates
from ..gating.attach import gates_of
from ..topk import ranks
from .allocate import Batches, Scores
from .learned import Masks, PerUnit, learned_criterion, learner, pull, straight_through, train_masks
from .taylor import vector_scores

TAU = 0.1
WIDTHS = 16  # as many as a search over refitted weights interpolates between (refit/levels.py)
HOTTEST, COLDEST = 5.0, 0.5  # temperature of single-number selection, at the start and at the end


class ElementSelection(PerUnit):
    """A logit for every unit: kept against dropped; see `Relaxation`."""

    rate = 0.1

    def __init__(self, gates: Gates) -> None:
        # σ(3) = 0.95: it starts near the dense model, as the search does.
        super().__init__(gates, 3.0)

    def masks(self, progress: float) -> Masks:
        return {name: hard_gumbel(logit, torch.rand_like(logit)) for name, logit in self.learned.items()}

    def penalty(self, progress: float) -> Tensor:
        # The expected cost, not that of the sample: its gradient does not depend on the noise.
        return pull(self.gates, self.scores(), progress)

    def scores(self) -> Scores:
        return {name: torch.sigmoid(logit) for name, logit in self.learned.items()}


def hard_gumbel(logit: Tensor, u: Tensor) -> Tensor:
    """First component of a hard Gumbel-softmax of (logit, 0): 1 where logit + log(u / (1 − u)) > 0, else 0.

    The difference of two Gumbel variables has a logistic distribution, and so has log(u / (1 − u)) for u uniform in
    (0, 1).

    Example:
        >>> hard_gumbel(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.4, 0.6, 0.2]))
        tensor([0., 1., 1.])
    """
    # `rand` can return 0, whose logarithm is infinite.
    u = u.clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logit + u.log() - (1 - u).log()) / TAU)
    return straight_through((soft > 0.5).to(soft), soft)


class PaS(PerUnit):
    """A weight for every unit; units with a weight of at least ½ are kept; see `Relaxation`."""

    rate = 0.02

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates, 1.0)

    def masks(self, progress: float) -> Masks:
        return {name: straight_through((w >= 0.5).to(w), w) for name, w in self.learned.items()}

    def penalty(self, progress: float) -> Tensor:
        return pull(self.gates, self.masks(progress), progress)

    def scores(self) -> Scores:
        return self.learned


class NumberSelection:
    """Logits over widths for every ratio; see `Relaxation`.

    Args:
        gates: the gates of the model.
        importance: the order of the units, per dim `[rows, units]`.
    """

    rate = 0.1

    def __init__(self, gates: Gates, importance: Scores) -> None:
        self.gates = gates
        self.nested, self.logits = {}, {}
        for name, dim in gates.dims.items():
            # 0 is the most important unit, so the first k of this order are the k best.
            from_the_top = dim.units - 1 - ranks(importance[name])
            widths = sorted({max(1, round(dim.units * j / WIDTHS)) for j in range(1, WIDTHS + 1)})
            sizes = torch.tensor(widths, device=from_the_top.device)
            self.nested[name] = (from_the_top[:, None] < sizes[:, None]).float()  # [rows, widths, units]
            rows = 1 if dim.shared else dim.rows
            self.logits[name] = torch.zeros(rows, len(widths), device=from_the_top.device).requires_grad_()

    def parameters(self) -> Iterable[Tensor]:
        return self.logits.values()

    def masks(self, progress: float) -> Masks:
        heat = HOTTEST * (COLDEST / HOTTEST) ** progress
        shares = {name: F.gumbel_softmax(logits, heat) for name, logits in self.logits.items()}
        return self.mixed(shares)

    def mixed(self, shares: dict[str, Tensor]) -> Masks:
        """Σ_i g_i·M_i of every row, `[rows, units]`, for shares g `[ratios, widths]`."""
        return {name: torch.einsum("rw,rwu->ru", g.expand(len(self.nested[name]), -1), self.nested[name])
                for name, g in shares.items()}  # fmt: skip

    def penalty(self, progress: float) -> Tensor:
        return pull(self.gates, self.scores(), progress)

    def scores(self) -> Scores:
        """The probability of each unit to be kept."""
        return self.mixed({name: logits.softmax(-1) for name, logits in self.logits.items()})


def number_selection_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """The probability of each unit to be kept. A quarter of the batches is used to order the units."""
    first = max(len(batches) // 4, 1)
    importance = vector_scores(model, batches[:first])
    scores = train_masks(model, NumberSelection(gates_of(model), importance), batches[first:])
    # Units between two of the 16 widths have the same probability. The order, too small to change anything else, breaks
    # the tie.
    order = {name: (ranks(values) + 1) * 1e-6 / values.shape[-1] for name, values in importance.items()}
    return {name: values + order[name] for name, values in scores.items()}


ELEMENT_SELECTION = learned_criterion(learner(ElementSelection))
PAS = learned_criterion(learner(PaS))
NUMBER_SELECTION = learned_criterion(number_selection_scores)
