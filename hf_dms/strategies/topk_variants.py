"""Top-k with a learned prune ratio, in variants: ours without one of its parts, and the gradient-estimated one.

The search itself is `dms` (training/trainer.py). These are its ablations, on the same frozen weights, resource loss,
falling target and warm-up, with masks as plain factors, so that any importance can be had of a mask's gradient g:

- dms_absolute, dms_gradient, dms_weights: the moving average of |m·g| or of g² in place of (m·g)², or Σ w² of a unit's
  weights, once, in place of an average.
- dms_minmax: importance scaled to [0, 1] by its smallest and largest value in place of ranks (equation 2), so that
  a = 0.5 need not be half of the units: those above a stay, and the soft mask itself counts for the resource.
- dms_plain: none of these; what the others are to be compared with. Its differences from `dms` are the optimizer's
  rate, 0.01 whatever the number of steps, and batches in place of a Trainer.
- estimated_topk: a hard mask, and every unit passes its gradient straight to a (the third way of modelling structure in
  the paper, arXiv 2405.07194, figure 1a); importance by g², since (m·g)² is 0 wherever the mask is.

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
from .learned import Masks, pull, straight_through, train_masks

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of a mask m and its gradient g
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
    """A hard top-k mask whose every unit has the derivative −1 in the prune ratio.

    Args:
        importance: `[rows, units]`.
        ratio: a `[rows]`.

    Example:
        >>> estimated_topk(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), torch.tensor([0.5]))
        tensor([[1., 0., 0., 1.]])
    """
    hard = topk_mask(importance, num_kept(ratio, importance.shape[-1]))
    return straight_through(hard, -ratio.unsqueeze(-1))


class TopK:
    """One prune ratio for every row and a moving importance; see `Relaxation`.

    Args:
        gates: of the model; their importance is what is averaged.
        kind: a key of `KINDS`, or weights: importance stays as it is.
        ranks: whether importance is normalised by ranks, else by `minmax`.
        estimated: whether the mask is `estimated_topk`.
    """

    rate = 0.01

    def __init__(self, gates: Gates, kind: str = "taylor", ranks: bool = True, estimated: bool = False) -> None:
        self.gates, self.kind, self.ranks, self.estimated = gates, kind, ranks, estimated
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
        """Of every dim, `[rows]`, differentiable."""
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
            return 0 * self.ratio.sum()  # Adam counts these steps too, as in the search
        kept = {}
        for name, ratio in self.ratios().items():
            importance, units = self.gates.importance(name), self.gates.dims[name].units
            kept[name] = linear_topk_count(importance, (1 - ratio) * units) if self.ranks else self._mask(name, ratio)
        return pull(self.gates, kept, progress)

    def scores(self) -> Scores:
        """How far above its row's ratio the normalised importance of each unit lies: one threshold, 0, gives sizes."""
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

    return Criterion(scores, allocation="global", dims=("layer", "depth"))


VARIANTS = {
    "dms_absolute": variant(kind="absolute"),
    "dms_gradient": variant(kind="gradient"),
    "dms_minmax": variant(ranks=False),
    "dms_plain": variant(),
    "dms_weights": variant(kind="weights"),
    "estimated_topk": variant(kind="gradient", estimated=True),
}
