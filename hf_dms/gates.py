"""All gates of a model: one flat float32 vector of prune ratios, the importance of every unit, all masks at once.

Equations 2 to 5 of the paper, batched over layers: the masks of a dim are one `[rows, units]` tensor, computed once per
forward. A row is a layer, or the whole model for a dim that all layers share (hidden, layers). Importance is the moving
average of (m·g)², g = dL_task/dm, and is never trained. This file knows nothing about models; masking.py connects it.

Masks travel as logarithms: for y = x·exp(log m), dL/d(log m) = m·dL/dm is exactly the Taylor term, with no division.
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
from .topk import linear_topk_count, log_soft_topk_mask, num_kept, topk_mask


@dataclass(frozen=True)
class GatedDim:
    """The gates of one dim.

    Attributes:
        name: the dim.
        rows: number of independent sets of units (layers, or 1).
        units: N, units per row.
        steepness: λ of the soft mask.
        shared: one prune ratio for all rows (layout uniform), or one per row.
        lowest, highest: sizes that a row must not leave, per row.
        protected: indices of units that are never pruned (whole layers, for the dim `layers`).
        step: sizes are multiples of it.
        follows: the dim whose prune ratio this one shares, so that it always keeps `units` / (that one's units) times
            as many; which ones, its own importance decides. The other one has one prune ratio for all rows.
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
        coarse: dims whose single units matter: layers, KV groups, heads, and all that does not absorb what they leave.
    """

    sizes: Sizes
    coarse: tuple[str, ...]


@dataclass(frozen=True)
class SearchSchedule:
    """How the search proceeds: what `Gates` needs of a DMSConfig."""

    target: float
    warmup_steps: int
    importance_decay: float
    target_ramp: float
    target_schedule: str
    resource_weight: float
    decide_at: float


GRIDS, GRID_POINTS = 6, 33  # together they tell 32^6 factors apart


class Gates(nn.Module):
    """Prune ratios, importance and masks of all gated dims of a model.

    They stay out of the `state_dict` of the model they are attached to (`search_state` has them), and stay float32
    when the model is cast.

    Args:
        dims: the gated dims.
        fixed_sizes: sizes of the other dims that the cost mentions.
        cost: the limited resource.
        schedule: how the search proceeds.
    """

    lower: Tensor
    upper: Tensor

    def __init__(
        self, dims: list[GatedDim], fixed_sizes: dict[str, int], cost: Cost, schedule: SearchSchedule, device=None
    ) -> None:
        super().__init__()
        self.dims = {dim.name: dim for dim in dims}
        self.fixed_sizes = fixed_sizes
        self.schedule = schedule
        self.num_updates = 0
        self.rounded: Sizes | None = None  # exact sizes that hard masks take instead of those of `rounder`
        self.rounder: Callable[[Gates], Rounded] | None = None  # the sizes that a cut would have now; set by attach_
        self.rounding: tuple[Any, Rounded] | None = None  # what it found, and for what
        self.decided: Sizes = {}  # dims that have whole sizes already, see `decide_`
        self.at_target: tuple[int, Tensor] | None = None  # updates and ratios when the target was last met, if decided
        self.found_resource: float | None = None  # what the search had come to when it decided, share of the dense one
        self.soft_in_evaluation = False  # whether evaluation mode runs on soft masks too, see `soft_masks`
        self.attachment: Any = None  # where in a model these gates are (masking.Attachment)
        self.refitted: frozenset[str] = frozenset()  # dims whose maps run refitted in training (refit/search.py)
        self.refit_ratio: Tensor | None = None  # the prune ratios when they were refitted
        self.log_masks: dict[str, tuple[Any, ...]] = {}  # tensors; None: no mask
        self.scales: Sizes = {}  # θ of scales exp θ, `[rows, units]` per dim or kind of norm (gating/scales.py)
        self._taylor: dict[str, Tensor] = {}
        self._gathered: set[str] = set()  # dims that a backward pass has reached since the last update
        lower, upper = self._bounds()
        self.prune_ratio = nn.Parameter(lower.clone().to(device))
        self.register_buffer("lower", lower.to(device))
        self.register_buffer("upper", upper.to(device))
        for dim in dims:
            self.register_buffer(f"importance_{dim.name}", torch.zeros(dim.rows, dim.units, device=device))
        self.cost = cost.to(self.prune_ratio.device)
        self.dense_resource = float(self.count(self.dense_sizes()))

    # ---- state -------------------------------------------------------------------------------------------------------
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest prune ratios that the allowed sizes mean, `[ratios]` each."""
        lower, upper = [], []
        for dim in self.dims.values():
            if dim.follows is None:
                low, high = 1 - torch.tensor(dim.highest) / dim.units, 1 - torch.tensor(dim.lowest) / dim.units
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
        """Importance of each unit, `[rows, units]`; infinite for protected units."""
        importance = self.raw_importance(name)
        if not self.dims[name].protected:
            return importance
        protected = torch.tensor(self.dims[name].protected, device=importance.device)
        return importance.index_fill(-1, protected, torch.inf)

    def search_state(self) -> dict[str, Tensor]:
        """Everything that a search must not lose, as tensors."""
        state = {f"importance_{name}": self.raw_importance(name) for name in self.dims}
        state |= {} if self.refit_ratio is None else {"refit_ratio": self.refit_ratio}
        state |= {f"decided_{name}": size for name, size in self.decided.items()}
        state |= {f"scale_{name}": scale for name, scale in self.scales.items()}
        if self.found_resource is not None:
            state["decided"] = torch.tensor(self.found_resource)
        return state | {"prune_ratio": self.prune_ratio.detach(), "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_search_state_(self, state: dict[str, Tensor]) -> None:
        """Inverse of `search_state`.

        Raises:
            ValueError: when the state belongs to other gates.
        """
        for name, tensor in self.search_state().items():
            if name == "refit_ratio" or name.startswith("decided"):
                continue
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
        lower, upper = self._bounds()
        self.lower.copy_(lower), self.upper.copy_(upper)
        self._fix_({name: state[f"decided_{name}"] for name in self.dims if f"decided_{name}" in state})
        self.found_resource = float(state["decided"]) if "decided" in state else None
        self.prune_ratio.copy_(state["prune_ratio"])
        self.refit_ratio = state.get("refit_ratio")
        self.num_updates = int(state["num_updates"])
        for name in self.dims:
            self.raw_importance(name).copy_(state[f"importance_{name}"])
        for name, scale in self.scales.items():
            scale.copy_(state[f"scale_{name}"])
        met = bool(self.decided) and bool(self._fits(self.prune_ratio[None]))  # as a search saves it after each step
        self.at_target = (self.num_updates, self.prune_ratio.detach().clone()) if met else None

    # ---- masks -------------------------------------------------------------------------------------------------------
    @property
    def is_warming_up(self) -> bool:
        """Whether every mask is still exactly 1, to gather importance before a ratio moves."""
        return self.num_updates < self.schedule.warmup_steps

    def compute_masks_(self) -> None:
        """Compute the masks of all dims for one forward pass: soft in training mode, hard in evaluation mode."""
        soft = self.training or self.soft_in_evaluation
        if self.training:
            self.clamp_ratios_()
        self.log_masks = {}
        for name in self._scaled_norms():
            self._keep_log_mask_(name, self.scales[name].clone().requires_grad_(self._gathers()))
        for name, dim in self.dims.items():
            if soft and name in self.refitted:
                self.log_masks[name] = (None,) * dim.rows
                continue
            if not soft:
                log_mask = topk_mask(self.importance(name), self.hard_units(name)).log()
            elif self.is_warming_up:
                log_mask = torch.zeros(dim.rows, dim.units, device=self.prune_ratio.device, requires_grad=True)
            elif name in self.decided:
                mask = topk_mask(self.importance(name), self.decided[name].to(self.prune_ratio.device))
                log_mask = mask.log().requires_grad_()
            else:
                log_mask = log_soft_topk_mask(self.importance(name), self.ratio(name), dim.steepness)
            self._keep_log_mask_(name, log_mask + self.scales[name] if name in self.scales else log_mask)

    def _gathers(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _keep_log_mask_(self, name: str, log_mask: Tensor) -> None:
        if self._gathers():
            log_mask.register_hook(_Accumulate(self._taylor, self._gathered, name))
        self.log_masks[name] = log_mask.unbind(0)

    def _scaled_norms(self) -> list[str]:
        """What has scales and is no dim."""
        return [name for name in self.scales if name not in self.dims]

    @torch.no_grad()
    def soft_fraction(self, name: str) -> Tensor:
        """Share of a dim's units whose soft mask is between 0.05 and 0.95, a scalar: small when masks are sharp."""
        if self.is_warming_up or name in self.decided:
            return torch.zeros((), device=self.prune_ratio.device)
        mask = log_soft_topk_mask(self.importance(name), self.ratio(name), self.dims[name].steepness).exp()
        return ((mask > 0.05) & (mask < 0.95)).float().mean()

    def hard_units(self, name: str) -> Tensor:
        """Units that a hard mask keeps, `[rows]` int64: as many as the cut would have now.

        Before the first update there is nothing to cut by, and they are the learned ones, all of them.
        """
        if self.rounded is not None:
            return self.rounded[name].to(self.prune_ratio.device)
        if self.rounder is None or self.num_updates == 0:
            return self.learned_units(name)
        return self.rounder(self).sizes[name].to(self.prune_ratio.device)

    def learned_units(self, name: str) -> Tensor:
        """The whole numbers nearest to what the ratios keep, `[rows]` int64, whatever the budget and multiples say."""
        dim = self.dims[name]
        if dim.follows is not None:
            return self.following_units(name, self.learned_units(dim.follows))
        lowest, highest = (torch.tensor(bound, device=self.prune_ratio.device) for bound in (dim.lowest, dim.highest))
        return num_kept(self.ratio(name), dim.units).clamp(lowest, highest)

    def following_units(self, name: str, leader_units: Tensor) -> Tensor:
        """Units that a dim keeps, `[..., rows]`, when the dim that it follows keeps `leader_units`, `[..., rows]`."""
        dim = self.dims[name]
        factor = dim.units // self.dims[str(dim.follows)].units
        return (factor * leader_units[..., :1]).expand(*leader_units.shape[:-1], dim.rows)

    @torch.no_grad()
    def clamp_ratios_(self) -> None:
        """Keep the prune ratios in [0, 1] and within the sizes that are allowed; every training forward does it too.

        Those that still move after a decision are kept at the target: once per move, and per update of the importance,
        by which the layers that count are ranked.
        """
        self.prune_ratio.clamp_(self.lower, self.upper)
        if not self.decided or self.decided.keys() == self.dims.keys():
            return
        if self.at_target is None or self.at_target[0] != self.num_updates or self._moved_from(self.at_target[1]):
            self._meet_target_()
            self.at_target = (self.num_updates, self.prune_ratio.detach().clone())

    @torch.no_grad()
    def decide_(self, progress: float) -> None:
        """Give the coarse dims the whole sizes that they would have in the cut, once, late in the search.

        Their masks are hard from then on, in training too. The finest dims learn on, at exactly the target: after each
        step their sizes are scaled to it by one factor. A short dim would otherwise stand half open to the end, and the
        cut would be another model than the one searched. Call it before each step.

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
        """Let dims have whole sizes, `[rows]` each, that no longer move; all others move."""
        self.decided = dict(sizes)
        for name, size in sizes.items():
            if (dim := self.dims[name]).follows is None:
                for ratios in (self.prune_ratio, self.lower, self.upper):
                    self._of_dim(ratios, name).copy_(1 - size[: dim.num_ratios] / dim.units)

    def _meet_target_(self) -> None:
        """Scale the sizes of dims that are not decided by one factor, so that all cost what the target allows.

        The factor is found on grids, each within a step of the one before.
        """
        start = self.prune_ratio.clone()
        moving = self.lower < self.upper
        low, width = torch.zeros((), device=start.device), 1 / (1 - start[moving]).min().clamp(min=1e-3)
        for _ in range(GRIDS):
            factors = low + width * torch.linspace(0, 1, GRID_POINTS, device=start.device)
            ratios = (1 - factors[:, None] * (1 - start)).clamp(self.lower, self.upper)
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
        """What belongs to a dim of vectors of all prune ratios, `[..., ratios]`, one per row: `[..., rows]`."""
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

        With several processes, average these tensors over them, in place, before `update_importance_` and the
        optimizer's step; in every process there are equally many, of the same shapes. Nothing else does it: the masks
        are no parameters, and the ratios belong to no DDP or FSDP group.
        """
        if self.prune_ratio.grad is None:
            self.prune_ratio.grad = torch.zeros_like(self.prune_ratio)
        for name in self.dims:
            self._taylor.setdefault(name, torch.zeros_like(self.raw_importance(name)))
        for name in self._scaled_norms():
            self._taylor.setdefault(name, torch.zeros_like(self.scales[name]))
        return [*(self._taylor[name] for name in (*self.dims, *self._scaled_norms())), self.prune_ratio.grad]

    def forget_step_(self) -> None:
        """Drop the Taylor terms since the last update, for a step that is not taken."""
        self._taylor.clear()
        self._gathered.clear()

    @torch.no_grad()
    def update_importance_(self) -> None:
        """Fold the task gradient since the last call into the importance: c ← d·c + (1 - d)·(m·g)² (equation 5).

        Call it once per optimizer step, after all backward passes of the step.

        Raises:
            ValueError: there was no backward pass through the model in training mode, so there is nothing to count.
        """
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
        cost, sizes = self.cost if cost is None else cost.to(device), {n: size.to(device) for n, size in sizes.items()}
        kept = {
            stack: linear_topk_count(self.importance(stack)[0], sizes[stack].squeeze(-1))
            for stack in cost.stacks
            if stack in self.dims
        }
        return cost.count(sizes, kept)

    def target(self, progress: float) -> float:
        """The falling target at a point of the search, as a fraction of the dense resource; 1 while warming up."""
        schedule = self.schedule
        if self.is_warming_up:
            return 1.0
        return scheduled_target(schedule.target, progress, schedule.target_ramp, schedule.target_schedule)

    def resource_loss(self, progress: float = 1.0) -> Tensor:
        """λ_resource·loss_resource, to be added to the task loss: a float32 scalar.

        It is computed from the prune ratios, not from the masks that carry the Taylor terms, so importance does not
        depend on it.

        Args:
            progress: fraction of the search that is done, in [0, 1]; 1 asks for the final target at once.
        """
        return self.schedule.resource_weight * resource_loss(self.resource(), self.target(progress))

    # ---- what an nn.Module would do and this one must not ------------------------------------------------------------
    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but stay float32 when it is cast."""
        device = fn(self.lower.new_empty(0)).device
        self.cost = self.cost.to(device)
        self.scales = {name: scale.to(device) for name, scale in self.scales.items()}
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the masks of the last forward pass, which belong to its autograd graph."""
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
        self.totals[self.name] = grad.detach().clone() if total is None else total.add_(grad)
