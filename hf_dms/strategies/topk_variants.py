"""Top-k with a learned prune ratio, in variants: DMS without one of its parts, and gradient-estimated top-k.

The search itself is `dms` (training/trainer.py). These are ablations of it, with the same frozen weights, resource
loss, falling target and warm-up. Masks are plain factors here, because importance can then be any function of a mask's
gradient g:

- dms_absolute, dms_gradient, dms_weights: the importance is the moving average of |m·g| or of g² in place of (m·g)², or
  Σ w² of a unit's weights, computed once.
- dms_minmax: importance is scaled to [0, 1] by its smallest and largest value in place of ranks (equation 2). Units
  above a stay, so a = 0.5 need not keep half of the units, and the soft mask itself counts for the resource.
- dms_plain: no change, as the baseline for the others. It differs from `dms` in the learning rate, which is 0.01 for
  any number of steps, and in using batches without a Trainer.
- estimated_topk: a hard mask, and every unit passes its gradient directly to a (the third way of modelling structure in
  the paper, arXiv 2405.07194, figure 1a). Importance is by g², because (m·g)² is 0 where the mask is 0.

λ and decay are options of every search: `dms: {sharpness: 4, importance_decay: 0.9}`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cut.prune import magnitude_importance
from ..gates import Gates
from ..gating.attach import gates_of
from ..topk import linear_topk_count, normalize_importance, num_kept, soft_topk_mask, topk_mask
from .allocate import Batches, Criterion, Scores
from .learned import Masks, learned_criterion, pull, straight_through, train_masks

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # importance from a mask m and its gradient g
    "taylor": lambda m, g: (m * g).square(),
    "absolute": lambda m, g: (m * g).abs(),
    "gradient": lambda m, g: g.square(),
}


def minmax(importance: Tensor) -> Tensor:
    """Importance scaled to [0, 1] in each row.

    Example:
        >>> minmax(torch.tensor([[3.0, 100.0, -1.0, 4.0]]))
        tensor([[0.0396, 1.0000, 0.0000, 0.0495]])
    """
    low, high = importance.aminmax(dim=-1, keepdim=True)
    return (importance - low) / (high - low).clamp(min=torch.finfo(importance.dtype).tiny)


def estimated_topk(importance: Tensor, ratio: Tensor) -> Tensor:
    """A hard top-k mask; the derivative of every unit with respect to the prune ratio is taken to be −1.

    Args:
        importance: `[rows, units]`.
        ratio: the prune ratio a, `[rows]`.

    Example:
        >>> estimated_topk(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), torch.tensor([0.5]))
        tensor([[1., 0., 0., 1.]])
    """
    hard = topk_mask(importance, num_kept(ratio, importance.shape[-1]))
    return straight_through(hard, -ratio.unsqueeze(-1))


class TopK:
    """One prune ratio for every row and a moving importance; see `Relaxation`.

    Args:
        gates: the gates of the model; the moving average is kept in their importance.
        kind: a key of `KINDS`, or weights: importance does not change.
        ranks: whether importance is normalised by ranks, or else by `minmax`.
        estimated: whether the mask is `estimated_topk`.
    """

    # The search's default (2 / steps) at 200 steps.
    rate = 0.01

    def __init__(self, gates: Gates, kind: str = "taylor", ranks: bool = True, estimated: bool = False) -> None:
        self.gates, self.kind, self.ranks, self.estimated = gates, kind, ranks, estimated
        # A copy: the ratios of the gates are set from the scores at the end, as for every criterion (`allocate_`).
        self.ratio = gates.prune_ratio.detach().clone().requires_grad_()
        self.steps = 0

    def parameters(self) -> Iterable[Tensor]:
        return [self.ratio]

    def masks(self, progress: float) -> Masks:
        with torch.no_grad():
            self.ratio.clamp_(self.gates.lower, self.gates.upper)
        self.steps += 1
        found = {}
        for name, ratio in self.ratios().items():
            mask = self._mask(name, ratio)
            mask.register_hook(functools.partial(self._see, name, mask.detach()))
            found[name] = mask
        return found

    def _mask(self, name: str, ratio: Tensor) -> Tensor:
        importance, dim = self.gates.importance(name), self.gates.dims[name]
        if self.steps <= self.gates.schedule.warmup_steps:
            return torch.ones_like(importance).requires_grad_()
        if self.estimated:
            return estimated_topk(importance, ratio)
        if self.ranks:
            return soft_topk_mask(importance, ratio, dim.steepness)
        return torch.sigmoid(dim.steepness * (minmax(importance) - ratio.unsqueeze(-1)))

    def ratios(self) -> dict[str, Tensor]:
        """The prune ratios of every dim, `[rows]`, differentiable."""
        dims = self.gates.dims
        parts = dict(zip(dims, self.ratio.split([dim.num_ratios for dim in dims.values()])))
        return {name: parts[dim.follows or name][: dim.rows].expand(dim.rows) for name, dim in dims.items()}

    @torch.no_grad()
    def _see(self, name: str, mask: Tensor, gradient: Tensor) -> None:
        if self.kind != "weights":
            decay = self.gates.schedule.importance_decay
            self.gates.raw_importance(name).mul_(decay).add_(KINDS[self.kind](mask, gradient), alpha=1 - decay)

    def penalty(self, progress: float) -> Tensor:
        if self.steps <= self.gates.schedule.warmup_steps:
            return 0 * self.ratio.sum()  # a gradient of 0, so that Adam counts these steps, as in the search
        kept = {}
        for name, ratio in self.ratios().items():
            importance, units = self.gates.importance(name), self.gates.dims[name].units
            # As in the search: the sum of a sharp soft mask has a slope that swings (topk.linear_topk_count).
            # By `minmax`, (1 − a)·N is not what stays, so a mask is counted: a new one without the hook, because
            # importance must not see the resource's gradient.
            kept[name] = linear_topk_count(importance, (1 - ratio) * units) if self.ranks else self._mask(name, ratio)
        return pull(self.gates, kept, progress)

    def scores(self) -> Scores:
        """Normalised importance of each unit minus its row's ratio. Units above the one threshold 0 stay."""
        normalize = normalize_importance if self.ranks else minmax
        return {name: normalize(self.gates.importance(name)) - a[:, None] for name, a in self.ratios().items()}


def variant(**options: str | bool) -> Criterion:
    """A criterion of `TopK` with options."""

    def scores(model: PreTrainedModel, batches: Batches) -> Scores:
        gates = gates_of(model)
        if options.get("kind") == "weights":
            for name, values in magnitude_importance(gates.attachment.bound, model, gates).items():
                gates.raw_importance(name).copy_(values)
        return train_masks(model, TopK(gates, **options), batches)  # type: ignore[arg-type]

    return learned_criterion(scores)


VARIANTS = {
    "dms_absolute": variant(kind="absolute"),
    "dms_gradient": variant(kind="gradient"),
    "dms_minmax": variant(ranks=False),
    "dms_plain": variant(),
    "dms_weights": variant(kind="weights"),
    "estimated_topk": variant(kind="gradient", estimated=True),
}
