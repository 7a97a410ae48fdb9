"""Which whole sizes a dim may have: multiples (`round_to`), protections, and the limits of a stock config.

rounding.py counts their cost, and chooses among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..archs.bind import BoundSpec
from ..archs.stock import Divisor, divisors, excluded_sizes
from ..config import DMSConfig
from ..errors import HfDmsError
from ..gates import Gates

# Size of every prune ratio, `[num_ratios]` per dim that follows no other one; `[..., num_ratios]` for several at once.
State = dict[str, Tensor]

HALF = 0.5 + 1e-6  # a learned size that misses a half by the rounding error of its float32 ratio counts as the half


class AllowedSizes:
    """The sizes that the dims of a request may have, separately and in combination.

    Attributes:
        step: per dim, sizes are multiples of it.
        low, high: per dim, smallest and largest size of every prune ratio, `[num_ratios]` int64.
        limits: products that must divide the size of another dim. A stock Llama needs heads that divide `hidden`.
        excluded: per dim, one size that it must not have, because the stock class is another network there (ELECTRA
            drops a projection where the embeddings are as wide as the layers).

    Raises:
        ValueError: a dim has no allowed size.
    """

    def __init__(self, gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> None:
        self.limits = divisors(bound, config, model_config, gates.dims)
        self.fixed = bound.sizes
        self.step: dict[str, int] = {}
        self.low: State = {}
        self.high: State = {}
        for name, dim in gates.dims.items():
            if dim.follows is None:
                low, high = torch.tensor(dim.lowest), torch.tensor(dim.highest)
                self.step[name] = dim.step
                # One ratio for all rows must suit the most protected layer.
                self.low[name] = low.max()[None] if dim.shared else low
                self.high[name] = high.min()[None] if dim.shared else high
                if name in config.sizes:  # nothing is left to choose; the search approaches it from above
                    self.high[name] = self.low[name].clone()
        self.excluded = excluded_sizes(bound, {name: dim.follows for name, dim in gates.dims.items()})
        for name, size in self.excluded.items():
            # An excluded size at an end of the range moves the end. Inside the range, `nearest` steps over it.
            self.low[name] += self.step[name] * (self.low[name] == size)
            self.high[name] -= self.step[name] * (self.high[name] == size)
            if self.low[name] > self.high[name]:
                raise HfDmsError(
                    f"dms.protect and dms.round_to leave {name} no size but {size}, and with that size the stock "
                    f"{bound.spec.model_type} class builds a different network. Loosen them."
                )
        # The ends of all dims in one row: rounding asks for a hundred nearest sizes, and dim by dim takes far longer.
        self._lengths = [len(low) for low in self.low.values()]
        self._low, self._high = torch.cat([*self.low.values()]), torch.cat([*self.high.values()])
        self._steps, self._excluded = (
            torch.tensor([of.get(name, -1) for name, length in zip(self.low, self._lengths) for _ in range(length)])
            for of in (self.step, self.excluded)
        )

    def nearest(self, wanted: State) -> State:
        """The allowed sizes nearest to wanted sizes, which may be fractional. Of two equally near sizes, the larger."""
        sizes = torch.cat([wanted[name] for name in self.low], -1)
        rounded = ((sizes / self._steps + HALF).floor() * self._steps).long().clamp(self._low, self._high)
        # The ends of the range are not excluded (see `__init__`), so a step down stays in it.
        rounded -= self._steps * (rounded == self._excluded)
        state = dict(zip(self.low, rounded.split(self._lengths, -1)))
        # After the clamping: a limit may move a size again, within its own range.
        for limit in self.limits:
            self._respect_(state, limit, wanted)
        return state

    def smallest(self) -> State:
        """The smallest allowed sizes."""
        return self.nearest({name: torch.zeros_like(low) for name, low in self.low.items()})

    def above(self, state: State, name: str, i: int) -> int | None:
        """The next larger allowed size of one prune ratio, all others unchanged."""
        step = int(self.step_at(state, name)) if self.limits else self.step[name]
        size, high = int(state[name][i]) + step, int(self.high[name][i])
        while size <= high:
            # Most architectures have neither, and this runs for every dim and layer in each step of the growth.
            checked = self.limits or name in self.excluded
            if not checked or self.allows(state | {name: torch.tensor([size])}):
                return size
            size += step
        return None

    def step_at(self, state: State, name: str) -> Tensor:
        """The step between sizes of a dim, all others unchanged: the least common multiple of `step` and its limits.

        Returns:
            `[]` or `[..., 1]` int64.
        """
        step = torch.tensor(self.step[name])
        for limit in self.limits:
            if limit.multiple == name:
                # `hidden` of a stock Llama moves in steps that both `round_to` and the number of heads divide.
                step = torch.lcm(step, limit.unit * self._size(state, limit.dim))
        return step

    def allows(self, state: State) -> Tensor:
        """Whether sizes that are each multiples within their range are allowed in combination, `[..., 1]`."""
        allowed = torch.tensor([True])
        for limit in self.limits:
            allowed = allowed & (self._size(state, limit.multiple) % (limit.unit * self._size(state, limit.dim)) == 0)
        for name, excluded in self.excluded.items():
            allowed = allowed & (self._size(state, name) != excluded)
        return allowed

    def _size(self, state: State, name: str) -> Tensor:
        return state[name] if name in state else torch.tensor([self.fixed[name]])

    def _respect_(self, state: State, limit: Divisor, wanted: State) -> None:
        """Change sizes so that a limit holds: the dim that must be a multiple, or the divisor if that dim is fixed."""
        moves = torch.tensor([False])  # whether the multiple moves
        if limit.multiple in state:
            step, name = self.step_at(state, limit.multiple), limit.multiple
            # -(-a // b) is division rounded up.
            low, high = -(-self.low[name] // step) * step, self.high[name] // step * step
            moves = low <= high
            nearest = ((wanted[name] / step + HALF).floor() * step).long().clamp(low, high)
            state[name] = torch.where(moves, nearest, state[name])
        if moves.all():
            return
        # The multiple is fixed, or none lies in its range: the divisor gives way.
        sizes = (
            torch.arange(int(self.low[limit.dim]), int(self.high[limit.dim]) + 1, self.step[limit.dim])
            if limit.dim in state
            else torch.empty(0)
        )
        allowed = self.allows(state | {limit.dim: sizes})
        if not (moves | allowed.any(-1, keepdim=True)).all():
            layouts = "per_layer" if limit.multiple in state else "per_layer or padded"
            raise HfDmsError(
                f"layout uniform: no allowed sizes make {limit.unit}·{limit.dim} a divisor of {limit.multiple}, which "
                f"the stock config demands. Use layout: {layouts}, or loosen protect and round_to."
            )
        distance = torch.where(allowed, (sizes - wanted[limit.dim]).abs(), torch.inf)
        nearest = torch.where(distance == distance.amin(-1, keepdim=True), sizes, 0).amax(-1, keepdim=True)
        state[limit.dim] = torch.where(moves, state[limit.dim], nearest)
