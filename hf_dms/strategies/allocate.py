"""From the scores of all units to prune ratios: one threshold for the whole model, or equal ratios.

A one-shot criterion gives each unit a score. From the scores, the gates get what a search would leave in them: an
importance for every unit and a ratio for every row. Rounding, cutting and the exact budget are then the same for all
strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HfDmsError
from ..gates import Gates
from ..resource import Sizes

Batches = Sequence[Mapping[str, Tensor]]
Scores = dict[str, Tensor]  # per dim `[rows, units]`, larger is more important


@dataclass(frozen=True)
class Criterion:
    """A one-shot way to choose structure.

    Attributes:
        scores: function of a model with gates and of batches (keyword arguments of forward passes, with labels if the
            criterion needs a loss). It returns a score for every unit, per gated dim `[rows, units]`.
        allocation: how the budget is divided. per_cost: one threshold on score per unit of resource; global: one
            threshold on the score itself; equal: the same ratio everywhere.
        needs_data: whether it uses batches at all.
        dims: the kinds of dims that it is defined for: layer (widths), model (hidden), depth (layers).
        passes: how often it runs each batch, to count the examples it has seen.
        changes_weights: whether it changes the model's weights.
        learns_masks: whether it trains masks, and so learns the scales of `dms.scales` beside them.
    """

    scores: Callable[[PreTrainedModel, Batches], Scores]
    allocation: str = "per_cost"
    needs_data: bool = True
    dims: tuple[str, ...] = ("layer", "model", "depth")
    passes: int = 1
    changes_weights: bool = False
    learns_masks: bool = False


def loss_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's loss on a batch.

    Raises:
        HfDmsError: there is none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise HfDmsError(
            "This criterion needs batches with labels, from which the model computes its loss. These have "
            f"{', '.join(batch)}."
        )
    return loss


@torch.no_grad()
def allocate_(gates: Gates, scores: Scores, allocation: str = "per_cost") -> None:
    """Set importance and prune ratios of gates from scores, in place.

    The units with the lowest scores go until the budget is met; each row keeps at least one unit. Where several rows
    share a ratio, they all lose one unit together. So the sum of the rows' k-th smallest scores counts there.

    Args:
        gates: the gates; the target is that of their schedule.
        scores: per gated dim `[rows, units]`.
        allocation: see `Criterion`.
    """
    # Past the warm-up, where masks would be open, and not 0, which `prune` takes for gates without a choice.
    gates.num_updates = max(gates.num_updates, gates.schedule.warmup_steps, 1)
    _set_ratios_(gates, sizes_of_scores(gates, scores, allocation))


@torch.no_grad()
def sizes_of_scores(gates: Gates, scores: Scores, allocation: str = "per_cost") -> Sizes:
    """Leave scores as importance in the gates, in place; the sizes `[rows]` that they ask for."""
    for name, values in scores.items():
        gates.raw_importance(name).copy_(values)
    return sizes_within_budget(gates, allocation)


def sizes_within_budget(gates: Gates, allocation: str = "per_cost") -> Sizes:
    """The largest sizes within the budget, with the importance in the gates as scores.

    Args:
        gates: the gates.
        allocation: see `Criterion`.

    Returns:
        Per dim `[rows]`, including dims that follow another one.
    """
    if allocation == "equal":
        return largest_fitting(gates, lambda share: _equal_sizes(gates, share))
    ranked = {name: _worth(gates, name, allocation) for name in gates.dims if gates.dims[name].follows is None}
    levels = torch.cat([worth.flatten() for worth in ranked.values()])
    # Protected units have infinite worth, and are no level that a threshold could take.
    levels = levels[levels.isfinite()].sort().values

    def sizes_above(share: float) -> Sizes:
        """Sizes that leave about this share of all units, those with the highest scores."""
        # The threshold is one of the scores, so each step of the bisection moves by whole units.
        level = levels[min(int((1 - share) * len(levels)), len(levels) - 1)]
        return {name: (worth > level).sum(-1).clamp(min=1) for name, worth in ranked.items()}

    return largest_fitting(gates, sizes_above)


def _worth(gates: Gates, name: str, allocation: str) -> Tensor:
    """Scores in ascending order, one row per ratio `[ratios, units]`; for `per_cost` divided by the cost of a unit."""
    dim = gates.dims[name]
    worth = gates.importance(name).double().sort(-1).values
    # Rows that share a ratio lose one unit each at a time: the k-th smallest of all rows go together.
    if dim.num_ratios == 1 and dim.rows > 1:
        worth = worth.sum(0, keepdim=True)
    # The greedy rule of a knapsack: what buys the least per resource goes first. A unit's cost depends on the sizes of
    # the other dims, which are not known yet, so the dense ones stand for them.
    if allocation == "per_cost":
        dense = gates.dense_sizes()
        one_less = gates.count(dense | {name: dense[name] - 1})  # one unit less in every row
        cost = (gates.count(dense) - one_less) / dim.num_ratios
        # A dim that costs nothing is worth infinitely much per cost, and stays whole.
        worth = worth / cost.clamp(min=1e-12)
    return worth


def _equal_sizes(gates: Gates, share: float) -> Sizes:
    return {
        # Fractions of units: rounding makes whole sizes, after every strategy (gating/rounding.py).
        name: torch.full((dim.num_ratios,), share * dim.units).clamp(min=1)
        for name, dim in gates.dims.items()
        if dim.follows is None
    }


def largest_fitting(gates: Gates, sizes_at: Callable[[float], Sizes]) -> Sizes:
    """The sizes at the largest share of units, in [0, 1], whose resource is within the target."""
    low, high, best = 0.0, 1.0, of_every_row(gates, sizes_at(0.0))
    # 2^-40 of all units: far below one unit of any model.
    for _ in range(40):
        share = (low + high) / 2
        sizes = of_every_row(gates, sizes_at(share))
        # The importance in the gates decides which layers are counted, so it must be set before this.
        fits = gates.resource(gates.dense_sizes() | sizes) <= gates.schedule.target
        low, high, best = (share, high, sizes) if fits else (low, share, best)
    return best


def of_every_row(gates: Gates, sizes: Sizes) -> Sizes:
    """Sizes of all gated dims, `[rows]` each, from one size per ratio: shared ones expanded, following dims added."""
    device = gates.prune_ratio.device
    whole = {name: size.to(device).double().expand(gates.dims[name].rows) for name, size in sizes.items()}

    def rows(name: str) -> Tensor:
        leader = gates.dims[name].follows
        return whole[name] if leader is None else gates.following_units(name, rows(leader))

    return {name: rows(name) for name in gates.dims}


def _set_ratios_(gates: Gates, sizes: Sizes) -> None:
    dims = [(name, dim) for name, dim in gates.dims.items() if dim.follows is None]
    ratios = [1 - sizes[name][: dim.num_ratios] / dim.units for name, dim in dims]
    gates.prune_ratio.copy_(torch.cat(ratios))
    gates.clamp_ratios_()
