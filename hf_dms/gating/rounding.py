"""From learned prune ratios to whole sizes that keep the budget exactly.

The learned sizes (1 - a)·N are scaled by one common factor, the largest with which their rounded values fit. Then, as
long as one more step of some dim fits, the dim that is furthest below its learned size takes it. So the result is at
most the target, maximal (no single allowed step of any dim still fits), and near what was learned.
"""

from __future__ import annotations

import math
from math import lcm

import torch
from torch import Tensor

from ..archs.bind import BoundSpec
from ..archs.stock import Divisor, divisors, excluded_sizes
from ..config import DMSConfig
from ..errors import HfDmsError
from ..gates import Gates
from ..resource import Sizes
from ..topk import topk_mask

State = dict[str, Tensor]  # whole size of every prune ratio, `[num_ratios]` int64 per dim


def round_sizes(gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> Sizes:
    """Whole sizes for every gated dim that keep the budget.

    Args:
        gates: prune ratios, importance and cost.
        bound: the architecture.
        config: the target, multiples and protections.
        model_config: the dense model's config.

    Returns:
        Per dim `[rows]` int64.

    Raises:
        ValueError: no allowed sizes meet the target; the message names the lowest target that can be met.
    """
    return _Rounding(gates, bound, config, model_config).solve()


def check_target(gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> None:
    """Check that allowed sizes can meet the target.

    Raises:
        ValueError: they cannot; the message names the lowest target that can be met.
    """
    _Rounding(gates, bound, config, model_config).smallest()


class _Rounding:
    def __init__(self, gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> None:
        self.gates = gates
        self.target = config.target
        self.budget = config.target * gates.dense_resource
        self.limits = divisors(bound, config, model_config, gates.dims)
        self.fixed = bound.sizes
        self.stacks = list(bound.stacks)
        self.stack_of = {name: bound.stack_of(name) for name in gates.dims}
        self.step, self.low, self.high, self.learned = {}, {}, {}, {}
        for name, dim in gates.dims.items():
            if dim.follows is not None:
                continue
            self.step[name] = dim.step
            low, high = torch.tensor(dim.lowest), torch.tensor(dim.highest)
            self.low[name] = low.max()[None] if dim.shared else low
            self.high[name] = high.min()[None] if dim.shared else high
            ratio = gates.ratio(name).detach().double().cpu()
            self.learned[name] = (1 - ratio[: dim.num_ratios]) * dim.units
        self.excluded = excluded_sizes(bound, {name: dim.follows for name, dim in gates.dims.items()})
        for name, size in self.excluded.items():
            self.low[name] += self.step[name] * (self.low[name] == size)
            self.high[name] -= self.step[name] * (self.high[name] == size)
            if self.low[name] > self.high[name]:
                raise HfDmsError(
                    f"dms.protect and dms.round_to leave {name} no size but {size}, at which the stock "
                    f"{bound.spec.model_type} is another architecture. Loosen them."
                )

    def solve(self) -> Sizes:
        state = self.smallest()
        scale, state = self._largest_fitting_scale(state)
        state = self._with_free_dims_whole(state)
        while (grown := self._grow(state, scale)) is not None:
            state = grown
        dropped = self._dropped_layers(state)  # growing them unit by unit would take long and change nothing
        for name, value in state.items():
            if len(value) > 1:
                rows = list(dropped[str(self.stack_of[name])])
                value[rows] = self.high[name][rows]
        return {name: self.rows(state, name).clone() for name in self.gates.dims}

    def rows(self, state: State, name: str) -> Tensor:
        """Sizes of all rows of a dim, `[..., rows]`, of those of its prune ratios or of the dim that it follows."""
        dim = self.gates.dims[name]
        if dim.follows is not None:
            return self.gates.following_units(name, self.rows(state, dim.follows))
        return state[name].expand(*state[name].shape[:-1], dim.rows)

    def smallest(self) -> State:
        """The smallest allowed sizes.

        Raises:
            ValueError: even they do not meet the target.
        """
        state = self.snap(0.0)
        lowest = float(self.count(state)) / self.gates.dense_resource
        if self.count(state) > self.budget:
            shown = math.ceil(lowest * 1e4) / 1e4
            raise HfDmsError(
                f"dms.target = {self.target:g} cannot be reached: with every pruned dim at its smallest size "
                f"{lowest:.4f} of the dense resource remains. Raise the target to at least {shown:.4f}, prune more "
                "dims, or loosen protect and round_to."
            )
        return state

    def _largest_fitting_scale(self, state: State) -> tuple[float, State]:
        """Bisect for the common factor; `state` is that of factor 0, which fits."""
        low, high = 0.0, max(float((self.high[name] / self.learned[name].clamp(min=1e-6)).max()) for name in state)
        high = min(high + 1.0, 1e9)
        for _ in range(64):
            middle = (low + high) / 2
            candidate = self.snap(middle)
            if self.count(candidate) <= self.budget:
                low, state = middle, candidate
            else:
                high = middle
        return low, state

    def snap(self, scale: float) -> State:
        """The allowed sizes nearest to `scale` times the learned ones."""
        state = {}
        for name, learned in self.learned.items():
            step = self.step[name]
            nearest = ((learned * scale / step + 0.5).floor() * step).long()
            state[name] = torch.minimum(torch.maximum(nearest, self.low[name]), self.high[name])
            if name in self.excluded:
                state[name] -= step * (state[name] == self.excluded[name])
        for limit in self.limits:
            self._respect_(state, limit)
        return state

    def _respect_(self, state: State, limit: Divisor) -> None:
        """Lower the sizes until a limit holds: the multiple to the next one below, or, if it is fixed, the divisor."""
        if limit.multiple in state:
            divisor = limit.unit * (int(state[limit.dim]) if limit.dim in state else self.fixed[limit.dim])
            step = lcm(self.step[limit.multiple], divisor)
            low = -(-int(self.low[limit.multiple]) // step) * step
            value = max(int(state[limit.multiple]) // step * step, low)
            if value <= int(self.high[limit.multiple]):
                state[limit.multiple] = torch.tensor([value])
                return
        candidates = (
            range(int(self.low[limit.dim]), int(state[limit.dim]) + 1, self.step[limit.dim])
            if limit.dim in state
            else ()
        )
        allowed = [size for size in candidates if self._allowed(state | {limit.dim: torch.tensor([size])})]
        if not allowed:
            layouts = "per_layer" if limit.multiple in state else "per_layer or padded"
            raise HfDmsError(
                f"layout uniform: no allowed sizes make {limit.unit}·{limit.dim} a divisor of {limit.multiple}, which "
                f"the stock config demands. Use layout: {layouts}, or loosen protect and round_to."
            )
        state[limit.dim] = torch.tensor([max(allowed)])

    def _allowed(self, state: State) -> bool:
        def size(name: str) -> int:
            return int(state[name]) if name in state else self.fixed[name]

        divide = all(size(limit.multiple) % (limit.unit * size(limit.dim)) == 0 for limit in self.limits)
        return divide and all(size(name) != excluded for name, excluded in self.excluded.items())

    def _with_free_dims_whole(self, state: State) -> State:
        """Leave a dim uncut if that costs nothing, as the MLP's width in key-value bytes."""
        bound_by_limits = {name for limit in self.limits for name in (limit.dim, limit.multiple)}
        for name in set(state) - bound_by_limits:
            whole = state | {name: self.high[name]}
            if self.count(whole) == self.count(state):
                state = whole
        return state

    def _grow(self, state: State, scale: float) -> State | None:
        """The state after one more allowed step of the dim that is furthest below its learned size, if any fits."""
        dropped = self._dropped_layers(state)
        gates = [
            (name, i)
            for name, value in state.items()
            for i in range(len(value))
            if len(value) == 1 or i not in dropped[str(self.stack_of[name])]
        ]
        steps = [(name, i, size) for name, i in gates if (size := self._next(state, name, i))]
        if not steps:
            return None
        candidates = {name: value.repeat(len(steps), 1) for name, value in state.items()}
        for row, (name, i, size) in enumerate(steps):
            candidates[name][row, i] = size
        fits = self.count(candidates) <= self.budget
        best, best_lack = None, -torch.inf
        for row, (name, i, size) in enumerate(steps):
            current = int(state[name][i])
            lack = (scale * float(self.learned[name][i]) - current) / (size - current)
            if fits[row] and lack > best_lack:
                best, best_lack = row, lack
        return None if best is None else {name: value[best] for name, value in candidates.items()}

    def _dropped_layers(self, state: State) -> dict[str, set[int]]:
        """Layers of each stack that go as a whole: their widths cost nothing and say nothing."""
        dropped: dict[str, set[int]] = {stack: set() for stack in self.stacks}
        for stack in self.stacks:
            if stack in state:
                mask = topk_mask(self.gates.importance(stack)[0].cpu(), state[stack].squeeze())
                dropped[stack] = set((mask == 0).nonzero().flatten().tolist())
        return dropped

    def _next(self, state: State, name: str, i: int) -> int | None:
        """The next larger allowed size of one prune ratio, all others unchanged."""
        step = self.step[name]
        for limit in self.limits:
            if limit.multiple == name:
                step = lcm(step, limit.unit * (int(state[limit.dim]) if limit.dim in state else self.fixed[limit.dim]))
        size, high = int(state[name][i]) + step, int(self.high[name][i])
        while size <= high:
            checked = self.limits or name in self.excluded
            if not checked or self._allowed(state | {name: torch.tensor([size])}):
                return size
            size += step
        return None

    def count(self, state: State) -> Tensor:
        """The limited resource, `[...]` float64, of sizes `[..., num_ratios]`."""
        sizes = {name: size.cpu() for name, size in self.gates.dense_sizes().items()}
        for name in self.gates.dims:
            sizes[name] = self.rows(state, name).double()
        device = self.gates.prune_ratio.device
        return self.gates.count({name: size.to(device) for name, size in sizes.items()}).cpu()
