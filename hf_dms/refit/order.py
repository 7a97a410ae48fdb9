"""In which order the units of a map go, if what stays is refitted each time: optimal brain surgery with K-FAC factors.

A map y = W x whose n inputs come in units (MLP channels, or the inputs of a head) has H = E[x xᵀ] and should give R,
with M = E[x Rᵀ]. Its refit on all inputs is W = H⁻¹M `[inputs, outputs]`. An error of the outputs is weighted by G
`[outputs, outputs]`; with G = E[g gᵀ], g the gradient at the output (curvature.py), costs are in units of loss.
Removing the inputs B of a unit from the refitted set, and refitting, adds to the weighted squared error

    tr((H⁻¹_BB)⁻¹ W_B G W_Bᵀ).

Then W ← W − H⁻¹[:,B] (H⁻¹_BB)⁻¹ W_B and H⁻¹ ← H⁻¹ − H⁻¹[:,B] (H⁻¹_BB)⁻¹ H⁻¹[B,:]. The weighting decides who goes, not
what the refit is. LLM Surgeon does this with G, ZipLM without it (G = I).
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
        keep: units that are left; those stand first in the order, the later they would have gone the earlier.
        block: units that go together before costs are computed anew. 1 is the exact greedy order.

    Returns:
        Order and costs. Costs inside a block are exact for the order in which they are listed.

    Examples:
        Three inputs that are orthogonal, of weights 3, 1 and 2, with G = 1: the second goes first, for 1² = 1.

        >>> eliminate(torch.eye(3).double(), torch.tensor([[3.0], [1.0], [2.0]]).double(), torch.arange(3)[:, None])
        Elimination(order=tensor([0, 2, 1]), costs=tensor([inf, 4., 1.], dtype=torch.float64))
    """
    factor = torch.linalg.cholesky(gram)
    inverse = torch.cholesky_inverse(factor)
    weight = torch.cholesky_solve(moment, factor)
    if metric is not None:
        weight = weight @ _root(metric)
    alive, gone, costs = torch.arange(len(units), device=gram.device), [], []
    columns = units.to(gram.device)
    while len(alive) > keep:
        scores = _removal_costs(inverse, weight, columns[alive])
        chosen = alive[scores.argsort()[: min(block, len(alive) - keep)]]
        removed = columns[chosen].flatten()
        # Cholesky of H⁻¹ on the block: its rows say what each unit costs after those before it are gone
        root, across = torch.linalg.cholesky(inverse[removed][:, removed]), inverse[:, removed]
        gains = torch.linalg.solve_triangular(root, weight[removed], upper=False)
        spread = torch.linalg.solve_triangular(root, across.T, upper=False).T
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
    """C with C Cᵀ = G, for a G that is positive semi-definite up to rounding."""
    values, vectors = torch.linalg.eigh(metric.double())
    return vectors * values.clamp(min=0).sqrt()


def _removal_costs(inverse: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """tr((H⁻¹_BB)⁻¹ W_B W_Bᵀ) of every unit, `[units]`, for weights that the metric's root has been multiplied into."""
    if columns.shape[1] == 1:
        column = columns[:, 0]
        return weight[column].square().sum(1) / inverse.diagonal()[column]
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    gains = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), weight[columns], upper=False)
    return gains.square().flatten(1).sum(1)


def _compact(
    inverse: Tensor, weight: Tensor, columns: Tensor, alive: Tensor, gone: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Leave the rows and columns of removed units out of the matrices, once there are enough of them."""
    used = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    removed = columns[torch.cat(gone)].flatten()
    used[removed[removed >= 0]] = False
    if used.double().mean() >= COMPACT_BELOW:
        return inverse, weight, columns
    places = torch.where(used, used.cumsum(0) - 1, -1)
    return inverse[used][:, used], weight[used], torch.where(columns >= 0, places[columns], -1)
