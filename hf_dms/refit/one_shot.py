"""Structure in one shot, by the loss that each removal costs after a refit: K-FAC OBS with one threshold for all
layers.

Costs are in units of the loss (order.py, curvature.py), so the costs of different maps are comparable. Per parameter,
the cheapest units of the whole model go until the budget is met. A walk goes through the layers and refits each on the
activations of the cut model in front of it. Those depend on the sizes, so the walk is repeated with the new sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec, bind
from ..archs.registry import spec_for
from ..archs.restoring import evaluating
from ..config import DMSConfig
from ..cut.plan import Plan
from ..cut.prune import make_plan
from ..errors import HfDmsError
from ..gates import Gates
from ..gating.attach import has_gates
from ..gating.gates_for import build_gates, for_stages
from ..gating.rounding import check_target, round_sizes
from ..gating.share import with_share
from ..resource import Sizes
from .curvature import Key, stream_factors
from .layerwise import LayerWalk
from .levels import RefittedMap, sweep
from .writes import find_stream_modules

Batches = Iterable[Mapping[str, Tensor]]


@torch.no_grad()
def one_shot_obs_plan(model: PreTrainedModel, dms_config: DMSConfig, batches: Batches, walks: int = 2) -> Plan:
    """The plan of a cut to the exact budget, by the loss that removing a unit costs after the others are refitted.

    Args:
        model: a dense model without gates; with labels it must return a loss. It is not modified.
        dms_config: what to prune, and how far. Only widths of layers can be pruned, not hidden or layers.
        batches: keyword arguments of forward passes with `labels`. All are held in memory at once.
        walks: number of walks through the layers.

    Returns:
        Which units stay, for `hf_dms.cut.slicing.cut` and `hf_dms.repair_`.

    Raises:
        ValueError: the request is not possible for this model, or batches have no labels.
    """
    if has_gates(model):
        raise HfDmsError("one_shot_obs_plan needs a model without gates. Take them off with hf_dms.detach_(model).")
    bound = bind(spec_for(model.config), model)
    dms_config = with_share(for_stages(dms_config, bound.spec), bound, model)
    gates = build_gates(bound, model, dms_config)
    check_layer_dims(bound, gates.dims, "one_shot_obs_plan")
    check_target(gates, bound, dms_config, model.config)  # before the walks, which take long
    batches = list(batches)
    factors = factors_of(model, bound, batches)
    # The first walk refits on the dense model's sizes, the second on those that the first one found.
    widths = {name: gates.dense_sizes()[name].long() for name in gates.dims}
    for _ in range(walks):
        maps = sweep(model, bound, batches, factors, widths)
        rank_(gates, maps)
        costs = removal_costs(gates, maps)
        widths = sizes_below_one_threshold(gates, costs)
    set_sizes_(gates, widths)
    # One threshold for all units leaves a part of the budget unused, and the rounding fills it.
    return make_plan(gates, round_sizes(gates, bound, dms_config, model.config))


@torch.no_grad()
def set_sizes_(gates: Gates, sizes: Sizes) -> None:
    """Set the prune ratios to those at which hard masks keep these sizes, per dim `[rows]`; equal where shared."""
    ratios = [1 - sizes[name][: dim.num_ratios].float() / dim.units for name, dim in gates.dims.items()]
    gates.prune_ratio.copy_(torch.cat(ratios))


def check_layer_dims(bound: BoundSpec, dims: Iterable[str], name: str) -> None:
    """Check that dims are widths of layers. Only for those can least squares choose units.

    Args:
        bound: the architecture.
        dims: names of the pruned dims.
        name: the caller's name, for the message.

    Raises:
        ValueError: a dim is not the width of a layer.
    """
    others = [dim for dim in dims if bound.spec.dim(dim).scope != "layer"]
    if others:
        widths = ", ".join(dim.name for dim in bound.spec.dims if dim.scope == "layer")
        raise HfDmsError(
            f"{name} chooses widths of layers, not {' and '.join(others)}. Prune only those, as prune: [{widths}]."
        )


def factors_of(model: PreTrainedModel, bound: BoundSpec, batches: Batches) -> dict[Key, Tensor]:
    """G behind every map that writes into the stream, see `stream_factors`."""
    first = {name: value for name, value in next(iter(batches)).items() if name != "labels"}
    with evaluating(model), torch.no_grad():
        places = find_stream_modules(LayerWalk(model, bound, [first]))
    return stream_factors(model, bound, places.writes, batches)


@torch.no_grad()
def rank_(gates: Gates, maps: Mapping[Key, RefittedMap]) -> None:
    """Set the importance of gates to the order of refitted maps, in place."""
    for (layer, _), refitted in maps.items():
        order, importance = refitted.elimination.order, gates.raw_importance(refitted.dim)
        ranks = torch.arange(len(order), 0, -1, device=order.device) / len(order)
        importance[layer, order] = ranks.to(importance)


def removal_costs(gates: Gates, maps: Mapping[Key, RefittedMap]) -> dict[str, Tensor]:
    """The loss that removing units costs, from refitted maps.

    Returns:
        Per dim `[rows, units]` float64: `costs[row, k]` is the increase of the loss when k + 1 units become k.
    """
    costs: dict[str, Tensor] = {}
    for (layer, _), refitted in sorted(maps.items()):
        dim = gates.dims[refitted.dim]
        total = costs.setdefault(dim.name, torch.zeros(dim.rows, dim.units).double())
        # The loss grows by half the weighted squared error, see `stream_factors`.
        total[layer] = refitted.elimination.costs / 2
    return costs


def sizes_below_one_threshold(gates: Gates, costs: Mapping[str, Tensor]) -> Sizes:
    """The largest sizes within the target, if the units of all layers that cost least loss per resource go first.

    Args:
        gates: cost and target. For a ratio that all rows share, the mean cost over the rows counts.
        costs: see `removal_costs`.

    Returns:
        Per dim `[rows]` int64.
    """
    dense = gates.dense_sizes()
    scores = {}
    for name, cost in costs.items():
        dim = gates.dims[name]
        one_less = dense | {name: dense[name] - 1}
        # `one_less` has one unit less in every row.
        per_unit = float(gates.count(dense) - gates.count(one_less)) / dim.rows
        cost = cost.mean(0, keepdim=True).expand_as(cost) if dim.shared else cost
        # A unit can cost less than the one removed before it. The running maximum, from the end, keeps the order.
        scores[name] = (cost / per_unit).flip(-1).cummax(-1).values.flip(-1)
    # Infinite: the unit that always stays.
    thresholds = torch.cat([score[score.isfinite()] for score in scores.values()]).sort().values

    def sizes_above(place: int) -> Sizes:
        # Protections and multiples hold whatever the threshold says.
        limits = {name: (torch.tensor(d.lowest), torch.tensor(d.highest)) for name, d in gates.dims.items()}
        found = {name: (score > thresholds[place]).sum(-1) for name, score in scores.items()}
        return {name: size.clamp(*limits[name]) for name, size in found.items()}

    low, high = 0, len(thresholds) - 1
    while low < high:  # the lowest threshold that fits
        middle = (low + high) // 2
        sizes = {name: size.float() for name, size in sizes_above(middle).items()}
        fits = bool(gates.resource(dense | sizes) <= gates.schedule.target)
        low, high = (low, middle) if fits else (middle + 1, high)
    return sizes_above(low)
