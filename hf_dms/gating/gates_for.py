"""From a request (a DMSConfig) and an architecture to gates, with the sizes they may take; and checks of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import gcd, lcm
from typing import Any

import torch
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec, bind
from ..archs.costs import build_cost
from ..archs.registry import spec_for
from ..archs.spec import ArchSpec
from ..archs.stock import check_layout, held_by_fixed, tied_sizes
from ..config import DMSConfig
from ..errors import HfDmsError
from ..gates import GatedDim, Gates, SearchSchedule
from ..topk import steepness_of


def build_gates(
    bound: BoundSpec, model: PreTrainedModel, config: DMSConfig, device: torch.device | None = None
) -> Gates:
    """The gates that a request asks for on a bound model.

    Args:
        bound: the architecture, bound to the model.
        model: the dense model, on any device, meta included.
        config: the request.
        device: where the gates live. Default: the model's device.

    Raises:
        ValueError: the request names a dim or a resource that the architecture lacks, or impossible sizes.
    """
    config = for_stages(config, bound.spec)
    check_request(bound, config)
    check_layout(bound, config.layout, dims_to_prune(bound, config), model.config)
    kept_layers = protected_layers(bound, config)
    dims, leaders = [], gated_dims(bound, config)
    for name, leader in leaders.items():
        units, rows = bound.sizes[name], bound.rows(name)
        low, high, step = size_range(bound, config, leaders, name)
        # A stock config holds one number per dim, so layout uniform learns one ratio for all layers. Which units stay
        # is still each layer's own choice.
        shared = config.layout == "uniform" or rows == 1
        # A layer that lacks the dim has a row too. If the row has a ratio of its own, it is kept whole, since nothing
        # would move the ratio.
        whole = kept_layers.get(bound.stack_of(name) or "", []) + ([] if shared else bound.rows_without(name))
        dims.append(
            GatedDim(
                name=name,
                rows=rows,
                units=units,
                steepness=steepness_of(units, config.sharpness),
                shared=shared,
                lowest=tuple(units if row in whole else low for row in range(rows)),
                highest=tuple(units if row in whole else high for row in range(rows)),
                protected=tuple(staying_layers(bound, config, name)) if name in bound.stacks else (),
                step=step,
                follows=leader,
            )
        )
    # The cost mentions every dim; those without gates enter with the size that they have.
    fixed_sizes = {name: size for name, size in bound.sizes.items() if name not in {dim.name for dim in dims}}
    cost = build_cost(bound, model, config.resource, config.resource_scope, config.sequence_length)
    schedule = SearchSchedule(
        target=config.target,
        warmup_steps=config.warmup_steps,
        importance_decay=config.importance_decay,
        scale_power=config.scale_power,
        target_ramp=config.target_ramp,
        target_schedule=config.target_schedule,
        resource_weight=config.resource_weight,
        decide_at=config.decide_at,
    )
    return Gates(dims, fixed_sizes, cost, schedule, device=model.device if device is None else device)


def recount_(gates: Gates, model: PreTrainedModel) -> None:
    """Update the cost of gates to their model as it is now, in place: its vocabulary may have been resized.

    Raises:
        ValueError: a dim with gates has another size now.
    """
    attachment = gates.attachment
    before, now, config = attachment.bound, bind(spec_for(model.config), model), attachment.config
    # `tied` too: a resized embedding may have lost its tie, and is then counted twice.
    if (before.sizes, before.tied) == (now.sizes, now.tied):
        return
    for name in gates.dims:
        if before.sizes[name] != now.sizes[name]:
            raise HfDmsError(
                f"The model has {now.sizes[name]} units of {name}, and had {before.sizes[name]} when its gates were "
                "put on. Take them off with hf_dms.detach_(model), attach them again, and search."
            )
    gates.fixed_sizes = {name: size for name, size in now.sizes.items() if name not in gates.dims}
    cost = build_cost(now, model, config.resource, config.resource_scope, config.sequence_length)
    gates.cost = cost.to(gates.prune_ratio.device)
    gates.dense_resource = float(gates.count(gates.dense_sizes()))
    gates.attachment = replace(attachment, bound=now)


def for_stages(config: DMSConfig, spec: ArchSpec) -> DMSConfig:
    """A request with words for the dims of all stages (`mlp`) replaced by each stage's dim (`mlp0`, `mlp1`, ...).

    A value for a single stage overrides the value for all stages. A request without such words is returned unchanged.
    """
    families = spec.families

    def names(given: Iterable[str]) -> tuple[str, ...]:
        # Each name once, in order: `mlp` and `mlp0` may both be given.
        return tuple(dict.fromkeys(name for word in given for name in families.get(word, (word,))))

    def values(given: Mapping[str, int]) -> dict[str, int]:
        together = {name: value for word, value in given.items() for name in families.get(word, ())}
        return together | {name: value for name, value in given.items() if name not in families}

    protect: dict[str, Any] = dict(config.protect)
    protect |= {key: values(protect[key]) for key in ("min", "max") if key in protect}
    protect |= {"dims": list(names(protect["dims"]))} if "dims" in protect else {}
    prune = None if config.prune is None else names(config.prune)
    changed: dict[str, Any] = {"prune": prune, "protect": protect}
    changed |= {option: values(getattr(config, option)) for option in ("round_to", "sizes")}
    same = all(getattr(config, key) == value for key, value in changed.items())
    return config if same else replace(config, **changed)


def dims_to_prune(bound: BoundSpec, config: DMSConfig) -> list[str]:
    """Names of the dims that a request prunes, in the architecture's order.

    A request that names none prunes all that its layout can.
    """
    held = held_by_fixed(bound.spec) if config.layout == "uniform" else {}
    wanted = [name for name in bound.spec.prunable if name not in held] if config.prune is None else config.prune
    return [n for n in bound.prunable if n in wanted and n not in config.protect.get("dims", ())]


def protected_layers(bound: BoundSpec, config: DMSConfig) -> dict[str, list[int]]:
    """Layers that a request keeps whole, per stack. A request numbers the layers of all stacks consecutively."""
    wanted = {layer % bound.total_layers for layer in config.protect.get("layers", ())}
    found, first = {}, 0
    for stack in bound.stacks:
        # -1 has become the last layer by the modulo above.
        found[stack] = sorted(layer - first for layer in wanted if 0 <= layer - first < bound.sizes[stack])
        first += bound.sizes[stack]
    return found


def staying_layers(bound: BoundSpec, config: DMSConfig, stack: str) -> list[int]:
    """Layers of a stack that are never dropped: the request keeps them whole, or the architecture needs them."""
    return sorted({*protected_layers(bound, config)[stack], *bound.fixed_layers[stack]})


def gated_dims(bound: BoundSpec, config: DMSConfig) -> dict[str, str | None]:
    """Every dim that gets gates, and the dim that it follows in size, if any.

    Raises:
        ValueError: layout uniform, and the request prunes only one of two dims that the stock config ties together.
    """
    names = dims_to_prune(bound, config)
    leaders: dict[str, str | None] = dict.fromkeys(names) | tied_sizes(bound, config, names)
    # Some classes lack a following dim: only a BERT with a pooler has `pool`.
    used = {factor for param in bound.params.values() for axis in param.axes for factor in axis}
    return leaders | {dim.name: dim.follows for dim in bound.spec.dims if dim.follows in names and dim.name in used}


def size_range(bound: BoundSpec, config: DMSConfig, leaders: dict[str, str | None], name: str) -> tuple[int, int, int]:
    """Smallest size, largest size and step of a dim, such that the dims that follow it get allowed sizes too.

    Raises:
        ValueError: there is no such size.
    """
    step, protect = config.round_to.get(name, 1), config.protect
    low, high = protect.get("min", {}).get(name, 1), protect.get("max", {}).get(name, bound.sizes[name])
    if name in bound.stacks:
        low = max(low, len(staying_layers(bound, config, name)))
    for follower in (follower for follower, leader in leaders.items() if leader == name):
        # A follower keeps `factor` units per unit of its leader (BERT's hidden size: the head size per head). Its range
        # and step, divided by that factor and rounded inwards, hold for the leader as well.
        factor = bound.sizes[follower] // bound.sizes[name]
        least, most, its_step = size_range(bound, config, leaders, follower)
        low, high = max(low, -(-least // factor)), min(high, most // factor)
        # The smallest number of the leader's units whose `factor`-fold is a multiple of the follower's step.
        step = lcm(step, its_step // gcd(its_step, factor))
    low, high = -(-low // step) * step, high // step * step
    if low > high:
        together = " and ".join([name, *(follower for follower, leader in leaders.items() if leader == name)])
        raise HfDmsError(
            f"dms.protect and dms.round_to leave no size for {together}: at least {low}, at most {high}. Loosen them"
            + (", or use layout: per_layer." if together != name else ".")
        )
    return low, high, step


def _families(bound: BoundSpec) -> list[str]:
    """The words that name a prunable dim of all stages at once, such as `mlp`."""
    return [word for word, names in bound.spec.families.items() if set(names) & set(bound.spec.prunable)]


def check_request(bound: BoundSpec, config: DMSConfig) -> None:
    """Check a request against an architecture.

    Raises:
        ValueError: it names a dim that the architecture lacks, or sizes or layers that cannot be.
    """
    spec, protect = bound.spec, config.protect
    named = {
        "dms.prune": config.prune or (),
        "dms.round_to": config.round_to,
        "dms.protect.dims": protect.get("dims", ()),
        "dms.protect.min": protect.get("min", {}),
        "dms.protect.max": protect.get("max", {}),
    }
    for option, names in named.items():
        for name in names:
            if name not in spec.prunable:
                raise HfDmsError(
                    f"{option}: {spec.model_type} has no dim '{name}'. Its dims are {', '.join(spec.prunable)}"
                    + (f"; all stages' together: {', '.join(_families(bound))}." if spec.families else ".")
                )
    pruned = dims_to_prune(bound, config)
    if not pruned:
        raise HfDmsError(
            "Nothing is left to prune: no dim of dms.prune can be cut in this model, or "
            "dms.protect.dims names them all."
        )
    for layer in protect.get("layers", ()):
        if not isinstance(layer, int) or not -bound.total_layers <= layer < bound.total_layers:
            raise HfDmsError(f"dms.protect.layers: the model has layers 0 to {bound.total_layers - 1}, got {layer!r}.")
    widths = [name for name in pruned if spec.dim(name).scope == "layer"]
    if protect.get("layers") and widths and config.layout == "uniform":
        raise HfDmsError(
            f"dms.protect.layers with layout uniform: all layers get the same {' and '.join(widths)}, so no layer can "
            "be left whole. Use layout: per_layer, or prune only layers and hidden."
        )
    for name in pruned:
        step, units = config.round_to.get(name, 1), bound.sizes[name]
        low, high = protect.get("min", {}).get(name, 1), protect.get("max", {}).get(name, units)
        if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high <= units):
            raise HfDmsError(
                f"dms.protect: sizes of {name} must lie in 1 to {units}, min at most max; got min {low}, max {high}."
            )
        if -(-low // step) * step > high // step * step:
            raise HfDmsError(
                f"dms.round_to.{name} = {step}: no multiple of it lies between {low} and {high}, the sizes allowed for "
                f"{name}. Choose a smaller one."
            )
