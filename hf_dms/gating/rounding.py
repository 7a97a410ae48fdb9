"""From learned prune ratios to whole sizes that keep the budget exactly.

The coarse dims (layers, KV groups, heads, and the hidden size beside MLPs) get the allowed sizes nearest to the
learned ones, (1 - a)·N. The finest dims take what is left: their learned sizes are scaled by one common factor, the
largest with which everything fits. As long as a step of one of these sizes still fits, the size that is furthest below
its learned value takes a step. So the result is at most the target, maximal (no single allowed step of any dim still
fits), and near what was learned.

Three cases need more:

- The learned sizes may miss the target by more than half a step of every coarse dim, because no search ran or because
  it ended too early. Then all sizes are first scaled to the target by one factor.
- A coarse size may be learned half way between two allowed ones. Then it is rounded both ways, and the result that
  leaves out less importance is taken.
- The finest dims may be too small to make room for the coarse ones. Then the coarse dims go down step by step. The
  next step is always the one whose units are least important for what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from ..archs.axes import terms
from ..archs.bind import BoundSpec
from ..config import DMSConfig
from ..errors import HfDmsError
from ..gates import Gates, Rounded
from ..resource import Sizes
from ..topk import topk_mask
from .allowed import AllowedSizes, State

ABOVE = 0.01  # learned resource above the target by no more than this share of it counts as on target
BELOW = 0.03  # the same below it
CLOSE = 0.01  # a coarse size that was learned no more than this share of a step beside a half is rounded both ways
# Everything may fit whatever the factor, because sizes are clamped to their ranges: the search needs an end.
LARGEST = 1e9  # a factor of learned sizes, beyond any that is needed
# Halvings of the range of a factor, by round, in which all that they may lead to are counted at once. After them a
# factor near 1 is known to 1e-10.
BISECTIONS = (6, 6, 6, 6, 5, 5)


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


def rounded_of(gates: Gates) -> Rounded:
    """The whole sizes of a model's gates at present. If nothing has changed since the last call, its result.

    Raises:
        ValueError: see `round_sizes`.
    """
    at = gates.attachment
    # `_version` counts in-place changes of a tensor: comparing it costs nothing, where comparing the importance itself
    # would read every unit on each evaluation batch. The id tells a new buffer from an old one.
    ranking = [*map(gates.raw_importance, gates.dims), *(gates.scales.values() if gates.scale_power else ())]
    versions = tuple((id(tensor), tensor._version) for tensor in ranking)
    # The dense resource too: `recount_` changes it when a vocabulary was resized.
    key = (gates.prune_ratio.tolist(), versions, [*gates.decided], at.config.target, gates.dense_resource)
    if gates.rounding is None or gates.rounding[0] != key:
        rounding = _Rounding(gates, at.bound, at.config, at.model_config)
        sizes = rounding.solve()
        gates.rounding = (key, Rounded(sizes, rounding.coarse()))
    return gates.rounding[1]


def sizes_of(gates: Gates) -> Sizes:
    """Whole sizes for the gates of a model as they are now, per dim `[rows]` int64.

    Raises:
        ValueError: see `round_sizes`.
    """
    return rounded_of(gates).sizes


def smallest_sizes(gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> tuple[State, float]:
    """The smallest allowed sizes, and what they cost of the limited resource."""
    rounding = _Rounding(gates, bound, config, model_config)
    state = rounding.allowed.smallest()
    return state, float(rounding.count(state))


def check_target(gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> None:
    """Check that allowed sizes can meet the target.

    Raises:
        ValueError: they cannot; the message names the lowest target that can be met.
    """
    _Rounding(gates, bound, config, model_config).smallest()


class _Rounding:
    """The rounding of the gates as they are.

    Attributes:
        allowed: the sizes that dims may have.
        learned: sizes by the ratios, (1 - a)·N, `[num_ratios]` float64 per dim.
        budget: the largest cost, in the unit of the resource.
        dense: sizes of all dims before pruning, float64.
        counted: the cost of sizes of all dims.
        finest: the dims that absorb what the others leave.
    """

    def __init__(self, gates: Gates, bound: BoundSpec, config: DMSConfig, model_config) -> None:
        self.gates, self.bound, self.target = gates, bound, config.target
        self.budget = config.target * gates.dense_resource
        self.dense = {name: size.cpu().double() for name, size in gates.dense_sizes().items()}
        # On the CPU, where whole sizes are decided: costs are counted hundreds of times, and each time an accelerator
        # would have to be waited for.
        self.counted = gates.counter(torch.device("cpu"))
        self.allowed = AllowedSizes(gates, bound, config, model_config)
        self.learned: State = {}
        for name in self.allowed.low:
            dim = gates.dims[name]
            # In float64, 1 - a is exact: the rounding error of the stored float32 ratio is then the only one, and
            # `HALF` allows for it.
            ratio = gates.ratio(name)[: dim.num_ratios].detach().double().cpu()
            self.learned[name] = (1 - ratio) * dim.units

    def solve(self) -> Sizes:
        # If the smallest sizes fit, every loop below ends at sizes that fit.
        self.smallest()
        if self.gates.decided.keys() == self.gates.dims.keys():
            self.finest = []  # `coarse` then names every dim
            return {name: size.clone() for name, size in self.gates.decided.items()}
        # Which dims are finest depends on the sizes around them (what a channel costs depends on `hidden`), so they are
        # found again for the scaled sizes.
        wanted = self._scaled_to_the_target()
        self.finest = self._finest(wanted)
        state = self._fitted(self._cheapest_of_close(wanted))
        dropped = self._dropped_layers(state)  # growing these unit by unit would take long and change nothing
        for name, value in state.items():
            # A dim with one ratio for all layers has no entry for a single dropped layer.
            if len(value) > 1:
                rows = list(dropped[str(self.bound.stack_of(name))])
                value[rows] = self.allowed.high[name][rows]
        return {name: self.rows(state, name).clone() for name in self.gates.dims}

    def smallest(self) -> State:
        """The smallest allowed sizes.

        Raises:
            ValueError: even they do not meet the target.
        """
        state = self.allowed.smallest()
        lowest = float(self.count(state)) / self.gates.dense_resource
        if self.count(state) > self.budget:
            # Rounded up, so that the target in the message can be met.
            shown = math.ceil(lowest * 1e4) / 1e4
            advice = f"Raise the target to at least {shown:.4f}, prune more dims, or loosen protect and round_to."
            if lowest == 1:
                dims = ", ".join(self.gates.dims)
                advice = (
                    f"What is pruned ({dims}) cannot lower it: its sizes are the smallest already, or dms.resource "
                    "does not count it. Prune other dims too."
                )
            raise HfDmsError(
                f"dms.target = {self.target:g} cannot be reached: with every pruned dim at its smallest size "
                f"{lowest:.4f} of the dense resource remains. {advice}"
            )
        return state

    def coarse(self) -> tuple[str, ...]:
        """The dims that do not absorb what is left, and also those that do if their units are layers or groups."""
        channels = [name for name in self.finest if self._kind(name) in ("layer", "model")]
        return tuple(name for name, dim in self.gates.dims.items() if (dim.follows or name) not in channels)

    # ---- what is wanted ----------------------------------------------------------------------------------------------
    def _scaled_to_the_target(self) -> State:
        """The learned sizes if rounding explains by how much they miss the target, otherwise all scaled to it alike."""
        self.finest = self._finest(self.learned)
        # Rounding moves a coarse size by half a step at most, and the finest dims make up for it. So a search that is
        # on target by this measure keeps its sizes; to scale them would undo what it learned.
        half = {name: (name not in self.finest) * self.allowed.step[name] / 2 for name in self.learned}
        below, above = ({n: size + sign * half[n] for n, size in self.learned.items()} for sign in (-1, 1))
        least, most = (float(self.count(self._within(sizes))) for sizes in (below, above))
        if least * (1 - ABOVE) <= self.budget <= most * (1 + BELOW):
            return self.learned
        # Every size that is not decided grows with the factor, and so does the cost: bisection finds where it crosses
        # the budget.
        free = [name for name in self.learned if name not in self.gates.decided]

        def scaled(factor: Tensor) -> State:
            return self._within(_scaled(self.learned, free, factor))

        return scaled(self._largest(lambda factors: self.count(scaled(factors)) <= self.budget))

    def _within(self, sizes: State) -> State:
        """Sizes clamped to their ranges; they need not be whole."""
        low, high = self.allowed.low, self.allowed.high
        return {name: size.clamp(low[name], high[name]) for name, size in sizes.items()}

    def _finest(self, wanted: State) -> list[str]:
        """The dims of the kind whose step costs least. Dims that cost nothing do not count."""
        state = self.allowed.nearest(wanted)
        free = [name for name in state if name not in self.gates.decided]
        # One step up and one down, of all ratios of a dim at once: `[2, dims, num_ratios]`, counted in one batch.
        moved = {name: size.expand(2, len(free), -1).clone() for name, size in wanted.items()}
        for i, name in enumerate(free):
            step = self.allowed.step_at(state, name)
            moved[name][:, i] = torch.stack([state[name] + step, state[name] - step]).double()
        # A step that is not allowed here changes nothing, so the larger difference counts, divided by the number of
        # ratios.
        differences = (self.count(self.allowed.nearest(moved)) - self.count(state)).abs().amax(0).tolist()
        costs = {name: cost / len(state[name]) for name, cost in zip(free, differences) if cost > 0}
        if not costs:
            return free
        # A network with stages has a dim of this kind in each stage, and all of them absorb alike.
        kind = self._kind(min(costs, key=lambda name: costs[name]))
        return [name for name in costs if self._kind(name) == kind]

    def _kind(self, name: str) -> str:
        """The kind of a dim's units: layers, groups of channels (heads, KV groups), or channels of layers or model."""
        if name in self.bound.stacks:
            return "depth"
        # The axis of heads is a product, (kv rep d), longer than the number of KV groups: a unit is several channels.
        axes = (axis for param in self.bound.params.values() for axis in param.axes if name in axis)
        found = (term for axis in axes for term in terms(axis) if name in term)
        grouped = any(self.bound.product(term) > self.bound.sizes[name] for term in found)
        return "group" if grouped else self.bound.spec.dim(name).scope

    # ---- what fits ---------------------------------------------------------------------------------------------------
    def _cheapest_of_close(self, wanted: State) -> State:
        """Round coarse sizes that lie half way between two allowed ones to the one that leaves out less importance.

        What a larger size takes from the finest dims counts as well, so both results are compared whole. One size is
        decided after the other: all combinations would be too many.
        """
        for name, i in [(n, i) for n, sizes in wanted.items() if n not in self.finest for i in range(len(sizes))]:
            step = self.allowed.step[name]
            below = math.floor(float(wanted[name][i]) / step)
            between = float(wanted[name][i]) / step - below
            if name in self.gates.decided or abs(between - 0.5) > CLOSE:
                continue
            ways = []
            for size in (below * step, (below + 1) * step):
                sizes = wanted[name].clone()
                sizes[i] = size
                ways.append(wanted | {name: sizes})
            # The larger size leaves less for the finest dims: only whole results show which keeps more importance.
            smaller, larger = map(self._fitted, ways)
            # True is 1, the larger size: it is taken where going down would lose importance, and in a tie.
            wanted = ways[self._importance_lost(larger, smaller) >= 0]
        return wanted

    def _fitted(self, wanted: State) -> State:
        """The allowed sizes near wanted ones that fit the budget and that no single step up fits."""
        wanted = self._fill(self._make_room(wanted))
        state = self._with_free_dims_whole(self.allowed.nearest(wanted))
        while (grown := self._grow(state, wanted)) is not None:
            state = grown
        return state

    def _make_room(self, wanted: State) -> State:
        """Lower wanted sizes of coarse dims until everything fits with the finest dims at their smallest sizes."""
        # Rounded up to what is allowed, "nothing" is the least that the finest dims can have.
        nothing = {name: torch.zeros_like(wanted[name]) for name in self.finest}
        state = self.allowed.nearest(wanted | nothing)
        while self.count(state) > self.budget:
            choices = []
            for name, i in [(n, i) for n, sizes in wanted.items() if n not in self.finest for i in range(len(sizes))]:
                lower = wanted[name].clone()
                lower[i] = int(state[name][i]) - self.allowed.step_at(state, name)
                candidate = self.allowed.nearest(wanted | nothing | {name: lower})
                # A size that is smallest already, or that of a dropped layer, saves nothing.
                if (saved := float(self.count(state) - self.count(candidate))) > 0:
                    choices.append((self._importance_lost(state, candidate) / saved, name, lower))
            if not choices:
                # These fit, as `solve` has checked. Where a limit ties two dims, single steps may not lead there.
                return {name: size.double() for name, size in self.allowed.smallest().items()}
            _, name, lower = min(choices, key=lambda choice: choice[0])
            wanted = wanted | {name: lower}
            state = self.allowed.nearest(wanted | nothing)
        return wanted

    def _importance_lost(self, state: State, other: State) -> float:
        """Importance of the units that other sizes leave out less that of those they add, in layers that both keep."""
        lost, dropped = 0.0, [self._dropped_layers(sizes) for sizes in (state, other)]
        for name, dim in self.gates.dims.items():
            # Protected units, of infinite importance, stay in both states. Their difference would be NaN.
            importance = self.gates.importance(name).cpu().nan_to_num(posinf=0.0).sort(dim=-1, descending=True).values
            # kept[r, k] is the importance of the k best units of row r, with 0 in front for k = 0.
            # float64, because the result is a small difference of long sums.
            kept = F.pad(importance.double().cumsum(-1), (1, 0))
            before, after = (
                kept.gather(-1, self.rows(sizes, name).unsqueeze(-1)).squeeze(-1) for sizes in (state, other)
            )
            stack = str(self.bound.stack_of(name))
            # Units of a dropped layer go with the layer, whose own importance counts in the dim `layers`.
            rows = [row for row in range(dim.rows) if not any(row in gone.get(stack, ()) for gone in dropped)]
            lost += float((before - after)[rows].sum())
        return lost

    def _fill(self, wanted: State) -> State:
        """The wanted sizes, those of the finest dims times the largest common factor with which everything fits."""

        def fits(factors: Tensor) -> Tensor:
            return self.count(self.allowed.nearest(_scaled(wanted, self.finest, factors))) <= self.budget

        return _scaled(wanted, self.finest, self._largest(fits))

    def _largest(self, fits: Callable[[Tensor], Tensor]) -> Tensor:
        """The largest factor that fits, by bisection, `[1]` float64; 0 if none is found.

        Args:
            fits: whether what factors `[factors, 1]` lead to fits, `[factors]`.
        """
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        while ends[1] < LARGEST and fits(ends)[1]:  # the factor is near 1, or a small multiple of it
            ends = torch.stack([ends[1], 2 * ends[1]])
        for halvings in BISECTIONS:
            parts = torch.arange(2**halvings + 1).unsqueeze(-1) / 2**halvings  # exact, as the factors below are
            factors = ends[0] + parts * (ends[1] - ends[0])
            fitting, at = fits(factors).tolist(), 0
            for half in reversed(range(halvings)):
                at += 2**half * fitting[at + 2**half]
            ends = factors[at : at + 2]
        return ends[0]

    def _with_free_dims_whole(self, state: State) -> State:
        """Leave a dim uncut if that costs nothing, as the MLP's width in key-value bytes."""
        # A dim in a limit is left alone: making it whole could break what the stock config demands.
        bound_by_limits = {name for limit in self.allowed.limits for name in (limit.dim, limit.multiple)}
        for name in (name for name in state if name not in bound_by_limits):
            whole = state | {name: self.allowed.high[name]}
            if self.count(whole) == self.count(state):
                state = whole
        return state

    def _grow(self, state: State, wanted: State) -> State | None:
        """The state after one more step that fits: finest dims come first, then sizes far below what is wanted."""
        # A step of each dim in each layer: hundreds, so they are counted in one batch.
        dropped = self._dropped_layers(state)
        steps = [
            (name, i, size)
            for name, value in state.items()
            for i in range(len(value))
            if len(value) == 1 or i not in dropped[str(self.bound.stack_of(name))]
            if (size := self.allowed.above(state, name, i))
        ]
        if not steps:
            return None
        # Each row of `candidates` is the whole state with one entry changed: `[steps, num_ratios]` per dim.
        candidates = {name: value.repeat(len(steps), 1) for name, value in state.items()}
        for row, (name, i, size) in enumerate(steps):
            candidates[name][row, i] = size
        fits = self.count(candidates) <= self.budget
        # Tuples compare in order: a step of a finest dim wins over any coarse one. Among equals, the dim that lacks the
        # most of its own steps wins, so dims with large steps are not favoured.
        best, best_lack = None, (False, -math.inf)
        for row, (name, i, size) in enumerate(steps):
            current = int(state[name][i])
            lack = (name in self.finest, (float(wanted[name][i]) - current) / (size - current))
            if fits[row] and lack > best_lack:
                best, best_lack = row, lack
        return None if best is None else {name: value[best] for name, value in candidates.items()}

    # ---- counting ----------------------------------------------------------------------------------------------------
    def rows(self, state: State, name: str) -> Tensor:
        """Sizes of all rows of a dim, `[..., rows]`, of those of its prune ratios or of the dim that it follows."""
        dim = self.gates.dims[name]
        if dim.follows is not None:
            return self.gates.following_units(name, self.rows(state, dim.follows))
        return state[name].expand(*state[name].shape[:-1], dim.rows)

    def _dropped_layers(self, state: State) -> dict[str, set[int]]:
        """Layers of each stack that go as a whole: their widths cost nothing and say nothing."""
        dropped: dict[str, set[int]] = {stack: set() for stack in self.bound.stacks}
        for stack in self.bound.stacks:
            if stack in state:
                # The same ranking as in the hard masks and in the cut, ties included.
                mask = topk_mask(self.gates.importance(stack)[0].cpu(), state[stack].squeeze())
                dropped[stack] = set((mask == 0).nonzero().flatten().tolist())
        return dropped

    def count(self, state: State) -> Tensor:
        """The limited resource, `[...]` float64, of sizes `[..., num_ratios]`."""
        sizes = {name: self.rows(state, name).double() for name in self.gates.dims}
        # Expanded, since none of these dims may be in the resource.
        return self.counted(self.dense | sizes).expand(next(iter(state.values())).shape[:-1])


def _scaled(sizes: State, names: Collection[str], factor: Tensor) -> State:
    """Sizes `[num_ratios]`, those of some dims times a factor: `[..., num_ratios]` for factors `[..., 1]`."""
    return {name: size * (factor if name in names else torch.ones_like(factor)) for name, size in sizes.items()}
