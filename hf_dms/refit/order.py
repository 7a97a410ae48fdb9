"""The order in which to remove the units of a map, if the rest is refitted after each: optimal brain surgery with
K-FAC.

The n inputs of a map y = W x belong to units (MLP channels, or the inputs of a head). Let H = E[x xᵀ]. The map should
give R; let M = E[x Rᵀ]. Its refit on all inputs is W = H⁻¹M `[inputs, outputs]`. Errors of the outputs are weighted by
G `[outputs, outputs]`; with G = E[g gᵀ], g the gradient at the output (curvature.py), costs are in units of the loss.
Removing the inputs B of a unit, and refitting the others, adds to the weighted squared error

    tr((H⁻¹_BB)⁻¹ W_B G W_Bᵀ).

Then W ← W − H⁻¹[:,B] (H⁻¹_BB)⁻¹ W_B and H⁻¹ ← H⁻¹ − H⁻¹[:,B] (H⁻¹_BB)⁻¹ H⁻¹[B,:]. The weighting changes the order of
removal, but not the refitted weights. LLM Surgeon (arXiv 2312.17244) does this with G, ZipLM (arXiv 2302.04089) without
(G = I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COMPACT_BELOW = 0.8  # share of columns still in use, below which the matrices are made smaller


@dataclass(frozen=True)
class Elimination:
    """The order of a map's units, and what each costs.

    Attributes:
        order: units, the most important first, `[units]` int64.
        costs: `[units]` float64; `costs[k]` is what the weighted squared error grows by, from the refit on the first
            k + 1 units of the order to the refit on the first k. Infinite for units that were never removed.
    """

    order: Tensor
    costs: Tensor


@torch.no_grad()
def eliminate(
    gram: Tensor, moment: Tensor, units: Tensor, metric: Tensor | None = None, keep: int = 1, block: int = 1
) -> Elimination:
    """Remove the cheapest units of a map, one block after the other, refitting the rest.

    Args:
        gram: H, damped so that it is positive definite, `[inputs, inputs]` float64.
        moment: M `[inputs, outputs]` float64.
        units: the inputs of each unit, `[units, inputs of a unit]` int64. Inputs of no unit (a bias) always stay.
        metric: G `[outputs, outputs]`, symmetric and positive semi-definite. Default: the identity.
        keep: number of units that are not removed. They come first in the order, the most expensive one first.
        block: number of units that are removed before costs are computed again. 1 is the exact greedy order.

    Returns:
        Order and costs. Costs inside a block are exact for the order in which they are listed.

    Examples:
        Three orthogonal inputs with weights 3, 1 and 2, and G = 1. The second goes first, at a cost of 1² = 1.

        >>> eliminate(torch.eye(3).double(), torch.tensor([[3.0], [1.0], [2.0]]).double(), torch.arange(3)[:, None])
        Elimination(order=tensor([0, 2, 1]), costs=tensor([inf, 4., 1.], dtype=torch.float64))
    """
    factor = torch.linalg.cholesky(gram)
    inverse = torch.cholesky_inverse(factor)
    weight = torch.cholesky_solve(moment, factor)
    if metric is not None:
        # tr(X G Xᵀ) = |X C|² for G = C Cᵀ: with the root in the weights, every cost is a plain sum of squares.
        weight = weight @ _root(metric)
    alive, gone, costs = torch.arange(len(units), device=gram.device), [], []
    columns = units.to(gram.device)
    while len(alive) > keep:
        # Costs of all units at once; exact only as long as nothing has been removed since.
        scores = _removal_costs(inverse, weight, columns[alive])
        chosen = alive[scores.argsort()[: min(block, len(alive) - keep)]]
        removed = columns[chosen].flatten()
        # With H⁻¹_BB = L Lᵀ, the squared row norms of L⁻¹ W_B are the costs of the units of the block one after the
        # other: each row gives the cost after the units of the rows above are gone.
        root, across = torch.linalg.cholesky(inverse[removed][:, removed]), inverse[:, removed]
        gains = torch.linalg.solve_triangular(root, weight[removed], upper=False)
        spread = torch.linalg.solve_triangular(root, across.T, upper=False).T
        # spread·spreadᵀ = H⁻¹[:,B] (H⁻¹_BB)⁻¹ H⁻¹[B,:] and spread·gains = H⁻¹[:,B] (H⁻¹_BB)⁻¹ W_B.
        # In place: these are the largest matrices here, `[inputs, inputs]`.
        inverse.addmm_(spread, spread.T, alpha=-1)
        weight.addmm_(spread, gains, alpha=-1)
        costs.append(gains.square().sum(1).view(len(chosen), -1).sum(1))
        gone.append(chosen)
        alive = alive[~torch.isin(alive, chosen)]
        inverse, weight, columns = _compact(inverse, weight, columns, alive, gone)
    stay = alive[_removal_costs(inverse, weight, columns[alive]).argsort(descending=True)]
    removed_order = torch.cat(gone) if gone else alive[:0]
    removed_costs = torch.cat(costs) if costs else gram.new_zeros(0)
    never = torch.full((len(stay),), torch.inf, dtype=gram.dtype, device=gram.device)
    return Elimination(torch.cat([stay, removed_order.flip(0)]), torch.cat([never, removed_costs.flip(0)]))


def _root(metric: Tensor) -> Tensor:
    """C with C Cᵀ = G. By eigenvalues, because rounding can make a semi-definite G slightly negative."""
    values, vectors = torch.linalg.eigh(metric.double())
    return vectors * values.clamp(min=0).sqrt()


def _removal_costs(inverse: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """tr((H⁻¹_BB)⁻¹ W_B W_Bᵀ) of every unit, `[units]`. The weights have been multiplied by the metric's root."""
    # The common case, an MLP: (H⁻¹_BB)⁻¹ is one number.
    if columns.shape[1] == 1:
        column = columns[:, 0]
        return weight[column].square().sum(1) / inverse.diagonal()[column]
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    gains = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), weight[columns], upper=False)
    return gains.square().flatten(1).sum(1)


def _compact(
    inverse: Tensor, weight: Tensor, columns: Tensor, alive: Tensor, gone: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the rows and columns of removed units from the matrices, once enough units are gone to pay for the copy."""
    used = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    removed = columns[torch.cat(gone)].flatten()
    # -1: columns that an earlier call has dropped.
    used[removed[removed >= 0]] = False
    if used.double().mean() >= COMPACT_BELOW:
        return inverse, weight, columns
    # The new place of each old column; -1 for a removed one.
    places = torch.where(used, used.cumsum(0) - 1, -1)
    return inverse[used][:, used], weight[used], torch.where(columns >= 0, places[columns], -1)
