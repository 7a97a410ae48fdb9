"""All gates of a model: one flat float32 vector of prune ratios, the importance of every unit, all masks at once.

Equations 2 to 5 of the paper, batched over layers: the masks of a dim are one `[rows, units]` tensor, computed once per
forward pass. A row is a layer, or the whole model for a dim that all layers share (hidden, layers). Importance is the
moving average of (m·g)², g = dL_task/dm, and is never trained. This file knows nothing about models; gating/attach.py
connects the two.

Masks travel as logarithms: for y = x·exp(log m), the gradient dL/d(log m) = m·dL/dm is exactly the Taylor term. Taking
it from dL/dm would need a product with m, and from y = x·m a division.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import HfDmsError
from .resource import Cost, Sizes, resource_loss, scheduled_target
from .topk import linear_count, log_soft_topk_mask, num_kept, topk_mask, units_above


@dataclass(frozen=True)
class GatedDim:
    """The gates of one dim.

    Attributes:
        name: the dim.
        rows: number of independent sets of units (layers, or 1).
        units: N, units per row.
        steepness: λ of the soft mask.
        shared: one prune ratio for all rows (layout uniform), or one per row.
        lowest, highest: smallest and largest allowed size, per row.
        protected: indices of units that are never pruned (whole layers, for the dim `layers`).
        step: sizes are multiples of it.
        follows: dim that decides how many units this one keeps. If that dim keeps a share p, this one keeps the same
            share, chosen by its own importance. The leading dim has one prune ratio for all rows.
    """

    name: str
    rows: int
    units: int
    steepness: float
    shared: bool
    lowest: tuple[int, ...]
    highest: tuple[int, ...]
    protected: tuple[int, ...] = ()
    step: int = 1
    follows: str | None = None

    @property
    def num_ratios(self) -> int:
        if self.follows is not None:
            return 0
        return 1 if self.shared else self.rows


class Rounded(NamedTuple):
    """Whole sizes that the learned ratios round to (gating/rounding.py).

    Attributes:
        sizes: units kept per dim, `[rows]` int64.
        coarse: dims of few, expensive units: layers, KV groups, heads. The other dims (MLP channels) absorb the part
            of the budget that whole units of these leave over.
    """

    sizes: Sizes
    coarse: tuple[str, ...]


@dataclass(frozen=True)
class SearchSchedule:
    """How the search proceeds: the part of a DMSConfig that `Gates` needs. The options' help texts describe each."""

    target: float
    warmup_steps: int
    importance_decay: float
    scale_power: float
    target_ramp: float
    target_schedule: str
    resource_weight: float
    decide_at: float


# `_meet_target_` searches on grids, not by bisection: a grid is one batched count, so it needs 6 counts for a
# resolution of 32^6 = 2^30, where bisection needs 30 counts one after the other.
GRIDS, GRID_POINTS = 6, 33


class Gates(nn.Module):
    """Prune ratios, importance and masks of all gated dims of a model.

    They stay out of the `state_dict` of the model they are attached to, so that its checkpoints load without gates;
    `search_state` returns them instead. They stay float32 when the model is cast.

    Args:
        dims: the gated dims.
        fixed_sizes: sizes of the other dims that the cost mentions.
        cost: the limited resource.
        schedule: how the search proceeds.
        device: where the tensors live. Default: torch's default device.
    """

    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        dims: list[GatedDim],
        fixed_sizes: dict[str, int],
        cost: Cost,
        schedule: SearchSchedule,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.dims = {dim.name: dim for dim in dims}
        self.fixed_sizes = fixed_sizes
        self.schedule = schedule
        self.num_updates = 0
        self.rounded: Sizes | None = None  # sizes that hard masks take instead of those of `rounder`
        self.rounder: Callable[[Gates], Rounded] | None = None  # computes the sizes of a cut made now; set by attach_
        self.rounding: tuple[Any, Rounded] | None = None  # cache of `rounder`: (inputs, result)
        self.decided: Sizes = {}  # dims that have their final whole sizes already, see `decide_`
        self.at_target: tuple[int, Tensor] | None = None  # updates and ratios when `_meet_target_` last ran
        self.found_resource: float | None = None  # share of the dense resource that was kept when `decide_` ran
        self.soft_in_evaluation = False  # whether evaluation mode runs on soft masks too, see `soft_masks`
        self.attachment: Any = None  # where in a model these gates are (gating/attach.Attachment)
        self.refitted: frozenset[str] = frozenset()  # dims with refitted maps in training (refit/search.py)
        self.refit_ratio: Tensor | None = None  # the prune ratios at the last refit
        self.log_masks: dict[str, tuple[Any, ...]] = {}  # per dim a tensor per row; None: that row has no mask
        self.scales: Sizes = {}  # θ of scales exp θ, `[rows, units]` per dim or kind of norm (gating/scales.py)
        self.scale_power = schedule.scale_power  # 0 after a choice without a search, whose scores rank units alone
        self._taylor: dict[str, Tensor] = {}
        self._gathered: set[str] = set()  # dims that a backward pass has reached since the last update
        lower, upper = self._bounds()
        # At the start as little is pruned as the sizes permit. A vector, because FSDP refuses parameters without axes.
        self.prune_ratio = nn.Parameter(lower.clone().to(device))
        self.register_buffer("lower", lower.to(device))
        self.register_buffer("upper", upper.to(device))
        for dim in dims:
            self.register_buffer(f"importance_{dim.name}", torch.zeros(dim.rows, dim.units, device=device))
        self.cost = cost.to(self.prune_ratio.device)
        self.dense_resource = float(self.count(self.dense_sizes()))

    # ---- state -------------------------------------------------------------------------------------------------------
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest prune ratio that the allowed sizes permit, `[ratios]` each."""
        lower, upper = [], []
        for dim in self.dims.values():
            if dim.follows is None:
                low, high = 1 - torch.tensor(dim.highest) / dim.units, 1 - torch.tensor(dim.lowest) / dim.units
                # A ratio that all rows share must suit the row with the least room.
                lower.append(low.max()[None] if dim.shared else low)
                upper.append(high.min()[None] if dim.shared else high)
        return torch.cat(lower).float(), torch.cat(upper).float()

    def _of_dim(self, ratios: Tensor, name: str) -> Tensor:
        """The part of a vector of all prune ratios that belongs to a dim, a view: `[..., num_ratios]`."""
        return dict(zip(self.dims, ratios.split([dim.num_ratios for dim in self.dims.values()], dim=-1)))[name]

    def ratio(self, name: str) -> Tensor:
        """Prune ratios of a dim, one per row: `[rows]`, differentiable unless they are decided."""
        return self._rows(self.prune_ratio.detach() if name in self.decided else self.prune_ratio, name)

    def raw_importance(self, name: str) -> Tensor:
        """The buffer that holds the moving average itself, `[rows, units]`."""
        return getattr(self, f"importance_{name}")

    def importance(self, name: str) -> Tensor:
        """Importance of each unit, times its scale to the power `scale_power`: `[rows, units]`.

        It is infinite for protected units.
        """
        importance = self.raw_importance(name)
        if self.scale_power and name in self.scales:
            importance = importance * (self.scale_power * self.scales[name].detach()).exp()
        if not self.dims[name].protected:
            return importance
        protected = torch.tensor(self.dims[name].protected, device=importance.device)
        return importance.index_fill(-1, protected, torch.inf)

    def search_state(self) -> dict[str, Tensor]:
        """Everything that a resumed search needs, as tensors by name."""
        state = {f"importance_{name}": self.raw_importance(name) for name in self.dims}
        state |= {} if self.refit_ratio is None else {"refit_ratio": self.refit_ratio}
        state |= {f"decided_{name}": size for name, size in self.decided.items()}
        state |= {f"scale_{name}": scale for name, scale in self.scales.items()}
        if self.found_resource is not None:
            state["found_resource"] = torch.tensor(self.found_resource)
        return state | {"prune_ratio": self.prune_ratio.detach(), "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_search_state_(self, state: dict[str, Tensor]) -> None:
        """Restore what `search_state` returned.

        Args:
            state: tensors by name.

        Raises:
            ValueError: the state belongs to other gates, or holds values that no search produces.
        """
        for name, tensor in self.search_state().items():
            if name in ("refit_ratio", "found_resource") or name.startswith("decided_"):
                continue  # a state has these only from some point of a search on
            if name not in state or state[name].shape != tensor.shape:
                found = "is missing" if name not in state else f"has shape {tuple(state[name].shape)}"
                raise HfDmsError(
                    f"search state: {name} {found}, expected shape {tuple(tensor.shape)}. "
                    "It was saved by a search over other dims, or with another layout."
                )
        for name, tensor in state.items():
            low, high = {"num_updates": (0, 2**31), "prune_ratio": (0, 1)}.get(name, (-torch.inf, torch.inf))
            if not (tensor.isfinite() & (tensor >= low) & (tensor <= high)).all():
                raise HfDmsError(f"search state: {name} holds numbers that no search has. Was the file changed?")
        for name, dim in self.dims.items():
            size = state.get(f"decided_{name}", torch.ones(dim.rows))
            if size.shape != (dim.rows,) or not ((size >= 1) & (size <= dim.units)).all():
                raise HfDmsError(f"search state: decided_{name} holds sizes that {name} cannot have.")
        # From the request's bounds, which `_fix_` may have narrowed since; it narrows them for what the state decided.
        lower, upper = self._bounds()
        self.lower.copy_(lower), self.upper.copy_(upper)
        self._fix_({name: state[f"decided_{name}"] for name in self.dims if f"decided_{name}" in state})
        self.found_resource = float(state["found_resource"]) if "found_resource" in state else None
        self.prune_ratio.copy_(state["prune_ratio"])
        self.refit_ratio = state.get("refit_ratio")
        self.num_updates = int(state["num_updates"])
        for name in self.dims:
            self.raw_importance(name).copy_(state[f"importance_{name}"])
        for name, scale in self.scales.items():
            scale.copy_(state[f"scale_{name}"])
        # A search saves its state after a step, when the ratios meet the target already. Meeting it once more would
        # move them by a rounding error, and the resumed search would no longer equal an uninterrupted one.
        met = bool(self.decided) and bool(self._fits(self.prune_ratio[None]))
        self.at_target = (self.num_updates, self.prune_ratio.detach().clone()) if met else None

    # ---- masks -------------------------------------------------------------------------------------------------------
    @property
    def is_warming_up(self) -> bool:
        """Whether every mask is still exactly 1. The first steps only gather importance, before a ratio moves."""
        return self.num_updates < self.schedule.warmup_steps

    @property
    def is_soft(self) -> bool:
        """Whether the model runs on soft masks."""
        return self.training or self.soft_in_evaluation

    def compute_masks_(self) -> None:
        """Compute the masks of all dims for one forward pass: soft in training mode, hard in evaluation mode."""
        if self.training:
            self.clamp_ratios_()
        self.log_masks = {}
        for name in self._scaled_norms():
            # A strategy that learns scales trains these tensors themselves (strategies/learned.py).
            scale = self.scales[name]
            self._keep_log_mask_(name, scale.clone().requires_grad_() if self._gathers() else scale)
        for name, dim in self.dims.items():
            if self.is_soft and name in self.refitted:  # its maps leave units out themselves, at the refitted width
                self.log_masks[name] = (None,) * dim.rows
                continue
            if not self.is_soft:
                # The logarithm of 0 is -inf, whose exponential is 0 again (`mask_of`).
                log_mask = topk_mask(self.importance(name), self.hard_units(name)).log()
            elif self.is_warming_up:
                # log 1, a leaf: there is a gradient for the importance, and none for the ratios.
                log_mask = torch.zeros(dim.rows, dim.units, device=self.prune_ratio.device, requires_grad=True)
            elif name in self.decided:  # no ratio to train; the gradient is there for the importance of what is kept
                mask = topk_mask(self.importance(name), self.decided[name].to(self.prune_ratio.device))
                log_mask = mask.log().requires_grad_()
            else:
                log_mask = log_soft_topk_mask(self.importance(name), self.ratio(name), dim.steepness)
            self._keep_log_mask_(name, log_mask + self.scales[name] if name in self.scales else log_mask)

    def _gathers(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _keep_log_mask_(self, name: str, log_mask: Tensor) -> None:
        if self._gathers():
            # On the whole tensor, in front of `unbind`: one hook and one sum per dim, however many layers read it.
            log_mask.register_hook(_Accumulate(self._taylor, self._gathered, name))
        self.log_masks[name] = log_mask.unbind(0)

    def _scaled_norms(self) -> list[str]:
        """Names of the norms that have scales; the other names in `scales` are dims."""
        return [name for name in self.scales if name not in self.dims]

    @torch.no_grad()
    def soft_fraction(self, name: str) -> Tensor:
        """Share of a dim's units whose soft mask is between 0.05 and 0.95, a scalar: small when masks are sharp."""
        if self.is_warming_up or name in self.decided:
            return torch.zeros((), device=self.prune_ratio.device)
        mask = log_soft_topk_mask(self.importance(name), self.ratio(name), self.dims[name].steepness).exp()
        return ((mask > 0.05) & (mask < 0.95)).float().mean()

    def hard_units(self, name: str) -> Tensor:
        """Number of units that a hard mask keeps, `[rows]` int64: those of a cut made now.

        Evaluation during a search thus runs on the sizes that `prune` would take. Before the first update no importance
        is known, so the learned sizes hold, which are the dense ones.
        """
        if self.rounded is not None:
            return self.rounded[name].to(self.prune_ratio.device)
        if self.rounder is None or self.num_updates == 0:
            return self.learned_units(name)
        return self.rounder(self).sizes[name].to(self.prune_ratio.device)

    def learned_units(self, name: str) -> Tensor:
        """The whole numbers nearest to what the ratios keep, `[rows]` int64; budget and `round_to` do not count."""
        dim = self.dims[name]
        if dim.follows is not None:
            return self.following_units(name, self.learned_units(dim.follows))
        lowest, highest = (torch.tensor(bound, device=self.prune_ratio.device) for bound in (dim.lowest, dim.highest))
        return num_kept(self.ratio(name), dim.units).clamp(lowest, highest)

    def following_units(self, name: str, leader_units: Tensor) -> Tensor:
        """Units that a dim keeps, `[..., rows]`, when its leading dim keeps `leader_units`, `[..., rows]`."""
        dim = self.dims[name]
        factor = dim.units // self.dims[str(dim.follows)].units
        return (factor * leader_units[..., :1]).expand(*leader_units.shape[:-1], dim.rows)

    @torch.no_grad()
    def clamp_ratios_(self) -> None:
        """Keep the prune ratios in [0, 1] and within the allowed sizes; every training forward pass does it too.

        After `decide_`, the ratios that still move are also kept at the target. That is repeated when a ratio has moved
        and when the importance was updated: importance ranks the layers, and dropped layers cost nothing.
        """
        self.prune_ratio.clamp_(self.lower, self.upper)
        if not self.decided or not (self.lower < self.upper).any():  # all is decided, or has one allowed size
            return
        if self.at_target is None or self.at_target[0] != self.num_updates or self._moved_from(self.at_target[1]):
            self._meet_target_()
            self.at_target = (self.num_updates, self.prune_ratio.detach().clone())

    @torch.no_grad()
    def decide_(self, progress: float) -> None:
        """Give the coarse dims the whole sizes of a cut made now, once, late in the search.

        Their masks are hard from then on, in training too. The finest dims learn on, at exactly the target: after each
        step their sizes are scaled to it by one factor. Without this, the soft mask of a short dim can leave a unit
        half open to the end of the search, and the cut model would differ from the searched one. Call it before each
        step.

        Args:
            progress: fraction of the search that is done, in [0, 1]; nothing happens before `decide_at`.
        """
        if self.decided or self.rounder is None or self.is_warming_up or self.num_updates == 0:
            return
        if self.schedule.decide_at <= progress < 1:
            rounded = self.rounder(self)
            self.found_resource = float(self.resource().detach())
            self._fix_({name: rounded.sizes[name] for name in rounded.coarse})
            self.clamp_ratios_()

    @torch.no_grad()
    def _fix_(self, sizes: Sizes) -> None:
        """Fix dims at whole sizes, `[rows]` each; all other dims keep learning."""
        self.decided = dict(sizes)
        for name, size in sizes.items():
            if (dim := self.dims[name]).follows is None:
                # Both bounds too, so that clamping takes back what an optimizer still does to the ratio.
                for ratios in (self.prune_ratio, self.lower, self.upper):
                    self._of_dim(ratios, name).copy_(1 - size[: dim.num_ratios] / dim.units)

    def _meet_target_(self) -> None:
        """Scale the sizes of the dims that are not decided by one factor, so that the whole model meets the target.

        The factor is found on grids: each grid divides the step of the previous one that contains the answer.
        """
        start = self.prune_ratio.clone()
        moving = self.lower < self.upper
        # Factor 0 gives the smallest sizes. The largest factor makes every dim whole, even the one that is cut most.
        low, width = torch.zeros((), device=start.device), 1 / (1 - start[moving]).min().clamp(min=1e-3)
        for _ in range(GRIDS):
            factors = low + width * torch.linspace(0, 1, GRID_POINTS, device=start.device)
            ratios = (1 - factors[:, None] * (1 - start)).clamp(self.lower, self.upper)
            # The cost grows with the factor, so the factors that fit come first. If none fits, the smallest is taken.
            best = self._fits(ratios).sum().clamp(min=1) - 1
            low, width = factors[best], width / (GRID_POINTS - 1)
            self.prune_ratio.copy_(ratios[best])

    def _fits(self, ratios: Tensor) -> Tensor:
        """Whether vectors of all prune ratios, `[..., ratios]`, cost no more than the target: `[...]` bool."""
        sizes = {name: (1 - self._rows(ratios, name)) * dim.units for name, dim in self.dims.items()}
        return self.count(self.dense_sizes() | sizes) <= self.schedule.target * self.dense_resource

    def _moved_from(self, ratios: Tensor) -> bool:
        return not torch.equal(self.prune_ratio, ratios.to(self.prune_ratio.device))

    def _rows(self, ratios: Tensor, name: str) -> Tensor:
        """The prune ratio of each row of a dim, `[..., rows]`, from vectors of all prune ratios, `[..., ratios]`."""
        if (leader := self.dims[name].follows) is not None:
            return self._rows(ratios, leader)[..., :1].expand(*ratios.shape[:-1], self.dims[name].rows)
        return self._of_dim(ratios, name).expand(*ratios.shape[:-1], self.dims[name].rows)

    @contextlib.contextmanager
    def soft_masks(self) -> Iterator[None]:
        """Run the model on soft masks in evaluation mode too, for a while."""
        self.soft_in_evaluation = True
        try:
            yield
        finally:
            self.soft_in_evaluation = False

    def step_terms(self) -> list[Tensor]:
        """What the backward passes of a step left in this process: Taylor terms of every dim, gradient of the ratios.

        With several processes, average these tensors over all processes, in place, before `update_importance_` and the
        optimizer's step. DDP and FSDP do not: the masks are not parameters, and the ratios belong to no DDP or FSDP
        group. Every process gets the same number of tensors of the same shapes, also if some have no gradient, because
        a collective operation would otherwise hang.
        """
        if self.prune_ratio.grad is None:
            self.prune_ratio.grad = torch.zeros_like(self.prune_ratio)
        for name in self.dims:
            self._taylor.setdefault(name, torch.zeros_like(self.raw_importance(name)))
        for name in self._scaled_norms():
            self._taylor.setdefault(name, torch.zeros_like(self.scales[name]))
        return [*(self._taylor[name] for name in (*self.dims, *self._scaled_norms())), self.prune_ratio.grad]

    def forget_step_(self) -> None:
        """Drop the Taylor terms since the last update. Call it for a step that is skipped."""
        self._taylor.clear()
        self._gathered.clear()

    @torch.no_grad()
    def update_importance_(self) -> None:
        """Fold the task gradient since the last call into the importance: c ← d·c + (1 - d)·(m·g)² (equation 5).

        Call it once per optimizer step, after all backward passes of the step.

        Raises:
            ValueError: no backward pass went through the model in training mode, so there is nothing to add.
        """
        # `_taylor` does not show it: `step_terms` fills it with zeros. Refitted dims have no masks to gather from.
        if not self._gathered and not self.refitted:
            raise HfDmsError(
                "update_importance_: no backward pass went through the model in training mode since the last call, so "
                "no importance was gathered. from_pretrained returns a model in evaluation mode: call model.train() "
                "before the loop (and again after each evaluation), and loss.backward() before update_importance_()."
            )
        decay = self.schedule.importance_decay
        for name, term in self._taylor.items():
            if name in self.dims and name not in self.refitted:
                self.raw_importance(name).mul_(decay).add_(term.square(), alpha=1 - decay)
            if name in self.scales:  # m·dL/dm is dL/dθ too
                self.scales[name].grad = None if self.is_warming_up else term.clone()
        self.forget_step_()
        self.num_updates += 1

    # ---- resource ----------------------------------------------------------------------------------------------------
    def dense_sizes(self) -> Sizes:
        """Sizes of all dims before pruning, `[rows]` each."""
        device = self.prune_ratio.device
        sizes = {name: torch.tensor([float(size)], device=device) for name, size in self.fixed_sizes.items()}
        return sizes | {n: torch.full((d.rows,), float(d.units), device=device) for n, d in self.dims.items()}

    def soft_sizes(self) -> Sizes:
        """k̃ = (1 - a)·N of every dim, `[rows]` each, differentiable in the prune ratios."""
        return self.dense_sizes() | {name: (1 - self.ratio(name)) * dim.units for name, dim in self.dims.items()}

    def hard_sizes(self) -> Sizes:
        """Units that hard masks keep, `[rows]` each."""
        return self.dense_sizes() | {name: self.hard_units(name).double() for name in self.dims}

    def resource(self, sizes: Sizes | None = None) -> Tensor:
        """Fraction of the dense resource that is kept, a float32 scalar (`[...]` for batched sizes).

        Args:
            sizes: default `soft_sizes()`, differentiable in the prune ratios.
        """
        sizes = self.soft_sizes() if sizes is None else sizes
        # Divided in float64, in which the counts are exact; a share is precise enough in float32.
        return (self.count(sizes) / self.dense_resource).float()

    def count(self, sizes: Sizes, cost: Cost | None = None) -> Tensor:
        """The limited resource itself at given sizes, in parameters, MACs or bytes.

        Args:
            sizes: `[..., rows]` per dim, on any device.
            cost: another resource to count.

        Returns:
            `[...]` float64, on the gates' device.
        """
        device = self.prune_ratio.device
        return self.counter(device, cost)({name: size.to(device) for name, size in sizes.items()})

    def counter(self, device: torch.device, cost: Cost | None = None) -> Callable[[Sizes], Tensor]:
        """`count` as a function of sizes on a device. The layers are ranked once, by their importance as it is now."""
        cost = (self.cost if cost is None else cost).to(device)
        above = {s: units_above(self.importance(s)[0].to(device)) for s in cost.stacks if s in self.dims}

        def count(sizes: Sizes) -> Tensor:
            kept = {stack: linear_count(order, sizes[stack].squeeze(-1)) for stack, order in above.items()}
            return cost.count(sizes, kept)

        return count

    def target(self, progress: float) -> float:
        """The falling target at a point of the search, as a fraction of the dense resource; 1 while warming up."""
        schedule = self.schedule
        if self.is_warming_up:
            return 1.0
        return scheduled_target(schedule.target, progress, schedule.target_ramp, schedule.target_schedule)

    def resource_loss(self, progress: float = 1.0) -> Tensor:
        """λ_resource·loss_resource, to be added to the task loss: a float32 scalar.

        It is computed from the prune ratios, not from the masks that carry the Taylor terms. So importance does not
        depend on the resource.

        Args:
            progress: fraction of the search that is done, in [0, 1]; 1 asks for the final target at once.
        """
        return self.schedule.resource_weight * resource_loss(self.resource(), self.target(progress))

    # ---- what nn.Module does by default and gates must not do --------------------------------------------------------
    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but stay float32 when it is cast."""
        # `fn` may move, cast or both; an empty tensor shows where it moves things.
        device = fn(self.lower.new_empty(0)).device
        self.cost = self.cost.to(device)
        self.scales = {name: scale.to(device) for name, scale in self.scales.items()}
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy contains. The masks of the last forward pass stay behind: they belong to its autograd graph."""
        return self.__dict__ | {"log_masks": {}}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Add nothing to the model's state dict."""

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        """Expect nothing from the model's state dict."""


@dataclass(frozen=True)
class _Accumulate:
    """Gradient hook of a log mask: sum the Taylor terms of the micro-batches of a step."""

    totals: dict[str, Tensor]
    gathered: set[str]
    name: str

    def __call__(self, grad: Tensor) -> None:
        self.gathered.add(self.name)
        total = self.totals.get(self.name)
        # A clone, because the next micro-batches add to it in place, and autograd may use `grad` elsewhere.
        self.totals[self.name] = grad.detach().clone() if total is None else total.add_(grad)
