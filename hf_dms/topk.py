"""The differentiable top-k operator of DMS (arXiv 2405.07194, equations 2 to 4): pure functions of tensors.

A dim with N units has an importance c in R^N and one learnable number a in [0, 1], its prune ratio. The operator keeps
the k = floor((1 - a) N + 1/2) most important units, at least one. Everything is batched over leading axes: importance
is `[..., units]`, prune_ratio `[...]`. Nothing here knows about models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# With the paper's λ = N, the mask of a dim is not fully open at a = 0: its lowest unit stands at sigmoid(1/2) = 0.62.
# In a dim of few units (heads, layers) that changes the model before anything is pruned. With this lower bound on λ,
# the mass that is missing at a = 0, about ln(2)·N/λ units, stays under 0.3 % of a dim of 32 units or more, and under
# 0.1 unit of a shorter one. benchmarks/README.md has the effect on the loss.
MIN_STEEPNESS = 256.0
MAX_STEEPNESS_PER_UNIT = 8.0  # with λ = 8 N the lowest unit starts at sigmoid(8/2) = 0.98


def ranks(importance: Tensor) -> Tensor:
    """Rank of each unit, 0 for the least important; equal units rank by index, so ranks are always a permutation.

    It sorts, which takes O(N log N) time and O(N) memory per row. Comparing all pairs would take N² of both.

    Args:
        importance: `[..., units]`, larger is more important.

    Returns:
        `[..., units]` int64.
    """
    order = importance.argsort(dim=-1, stable=True)
    # Ranks are the inverse permutation of this order. To scatter is cheaper than to sort `order` once more.
    positions = torch.arange(importance.shape[-1], device=importance.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def normalize_importance(importance: Tensor) -> Tensor:
    """Map any distribution of importance to a uniform one: c'_i = (rank_i + 1/2) / N (equation 2, at midpoints).

    The midpoint makes the soft mask cross 1/2 exactly between the units that a hard mask keeps and those it drops.

    Args:
        importance: `[..., units]`.

    Returns:
        `[..., units]` float32 in (0, 1) (float64 for float64 input); no gradient flows through it.

    Examples:
        >>> normalize_importance(torch.tensor([3.0, 100.0, -1.0, 4.0]))
        tensor([0.3750, 0.8750, 0.1250, 0.6250])
    """
    # Never half precision, whatever the model's: bfloat16 holds whole numbers up to 256 only, so ranks would be equal.
    dtype = torch.float64 if importance.dtype == torch.float64 else torch.float32
    return (ranks(importance.detach()).to(dtype) + 0.5) / importance.shape[-1]


def steepness_of(num_units: int, sharpness: float | None = None) -> float:
    """Steepness λ of the soft mask of a dim with `num_units` units.

    The paper's λ = N, raised for short dims: λ = max(N, min(8 N, 256)), so that they are open at a = 0.

    Args:
        num_units: N.
        sharpness: λ / N, when set by the user.
    """
    if sharpness is not None:
        return sharpness * num_units
    return max(float(num_units), min(MAX_STEEPNESS_PER_UNIT * num_units, MIN_STEEPNESS))


def log_soft_topk_mask(importance: Tensor, prune_ratio: Tensor, steepness: float | None = None) -> Tensor:
    """Logarithm of `soft_topk_mask`: the form in which masks travel through a model (see masked_ops.py).

    `logsigmoid` stays finite where the mask itself underflows to 0, and with it the gradient of the ratio.

    Args:
        importance: `[..., units]`, larger is more important; no gradient flows to it.
        prune_ratio: `[...]` in [0, 1].
        steepness: λ; default N, the paper's.

    Returns:
        `[..., units]`, at most 0.
    """
    if steepness is None:
        steepness = float(importance.shape[-1])
    return F.logsigmoid(steepness * (normalize_importance(importance) - prune_ratio.unsqueeze(-1)))


def soft_topk_mask(importance: Tensor, prune_ratio: Tensor, steepness: float | None = None) -> Tensor:
    """Soft mask m_i = sigmoid(λ (c'_i - a)) (equation 3), differentiable in a: dm_i/da = -λ m_i (1 - m_i).

    Args:
        importance: `[..., units]`, larger is more important; no gradient flows to it.
        prune_ratio: `[...]` in [0, 1]; 0 prunes nothing, 1 everything.
        steepness: λ; default N, the paper's.

    Returns:
        `[..., units]` in (0, 1). The units above 1/2 are those of `hard_topk_mask`, except that this mask has none at
        a = 1. At a = 0 and λ = N the least important units are not quite open: 0.62, 0.82, 0.92, ...

    Examples:
        >>> soft_topk_mask(torch.tensor([3.0, 100.0, -1.0, 4.0]), torch.tensor(0.5))
        tensor([0.3775, 0.8176, 0.1824, 0.6225])
    """
    if steepness is None:
        steepness = float(importance.shape[-1])
    return torch.sigmoid(steepness * (normalize_importance(importance) - prune_ratio.unsqueeze(-1)))


def num_kept(prune_ratio: Tensor, num_units: int) -> Tensor:
    """Number of units that a prune ratio keeps: k = floor((1 - a) N + 1/2), at least 1.

    The sum is computed in float64. A value that misses a half by no more than the rounding error of a counts as the
    half. So a = 0.05 of 10 units keeps 10 units in float32, as it does on paper.

    Args:
        prune_ratio: `[...]` in [0, 1].
        num_units: N.

    Returns:
        `[...]` int64 in [1, N].
    """
    a = prune_ratio.detach().double()
    error = torch.finfo(prune_ratio.dtype).eps / 2 * num_units
    return ((1 - a) * num_units + 0.5 + error).floor().long().clamp(1, num_units)


def topk_mask(importance: Tensor, num_units_kept: Tensor) -> Tensor:
    """0/1 mask of the k most important units.

    Args:
        importance: `[..., units]`.
        num_units_kept: `[...]` int, k.

    Returns:
        `[..., units]` float32 (float64 for float64 importance), with exactly k ones in each row.
    """
    dtype = torch.float64 if importance.dtype == torch.float64 else torch.float32
    num_units = importance.shape[-1]
    # By ranks, not by a threshold on importance: equal units would all pass it or none.
    return (ranks(importance.detach()) >= num_units - num_units_kept.unsqueeze(-1)).to(dtype)


def hard_topk_mask(importance: Tensor, prune_ratio: Tensor) -> Tensor:
    """0/1 mask with exactly k = floor((1 - a) N + 1/2) ones, at least one; of equal units the later ones stay.

    Args:
        importance: `[..., units]`.
        prune_ratio: `[...]` in [0, 1].

    Returns:
        `[..., units]` float32 (float64 for float64 importance).

    Examples:
        >>> hard_topk_mask(torch.tensor([3.0, 100.0, -1.0, 4.0]), torch.tensor(0.5))
        tensor([0., 1., 0., 1.])
    """
    return topk_mask(importance, num_kept(prune_ratio, importance.shape[-1]))


def linear_topk_count(importance: Tensor, units_kept: Tensor) -> Tensor:
    """How much of each unit counts towards the resource when `units_kept` units stay; the number may be fractional.

    The most important units count 1, the unit at the edge counts its fraction, and the rest count 0. So the sum is
    `units_kept`, and its slope is 1 everywhere. The sum of a sharp soft mask would do as a relaxation too, but its
    slope swings between 0.3 and 2.

    Args:
        importance: `[..., units]`.
        units_kept: `[...]` float.

    Returns:
        `[..., units]` in [0, 1], differentiable in `units_kept`.
    """
    return linear_count(units_above(importance), units_kept)


def units_above(importance: Tensor) -> Tensor:
    """How many units are more important than each unit, `[..., units]` int64: 0 for the best."""
    return importance.shape[-1] - 1 - ranks(importance.detach())


def linear_count(above: Tensor, units_kept: Tensor) -> Tensor:
    """`linear_topk_count` of units whose `units_above` are known."""
    return (units_kept.unsqueeze(-1) - above).clamp(0, 1)
