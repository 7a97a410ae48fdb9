"""Requests with an amount (`target: 100M`) or a shape (`sizes`): the fraction of the dense resource that they keep."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..config import DMSConfig, amount
from ..errors import HfDmsError
from .gates_for import build_gates, for_stages
from .rounding import smallest_sizes


def with_share(config: DMSConfig, bound: BoundSpec, model: PreTrainedModel) -> DMSConfig:
    """The request with its target as a fraction of the dense resource, also if it gives an amount or a shape.

    Args:
        config: the request.
        bound: the architecture, bound to the model.
        model: the dense model; the meta device will do.

    Raises:
        ValueError: the amount is more than the dense model has, the shape is impossible, or the request gives both a
            shape and a target that contradicts it.
    """
    if config.sizes:
        return _with_share_of_shape(for_stages(config, bound.spec), bound, model)
    if not isinstance(config.target, str):
        return config
    # The cost of the whole model depends on no target, so any will do.
    dense = build_gates(bound, model, replace(config, target=1.0), device=torch.device("cpu")).dense_resource
    if amount(config.target) > dense:
        raise HfDmsError(
            f"dms.target = {config.target} is more than the dense model has: {dense:,.0f} {config.resource} "
            f"(resource_scope {config.resource_scope}). Lower it."
        )
    return replace(config, target=amount(config.target) / dense)


def _with_share_of_shape(config: DMSConfig, bound: BoundSpec, model: PreTrainedModel) -> DMSConfig:
    """The request with the cost of its sizes as target. That target can just be met, so no other sizes are possible."""
    sizes = config.sizes
    for name, size in sizes.items():
        if name not in bound.spec.prunable:
            dims = ", ".join(bound.spec.prunable)
            raise HfDmsError(f"dms.sizes: {bound.spec.model_type} has no dim '{name}'. Its dims are {dims}.")
        if size > bound.sizes[name]:
            raise HfDmsError(
                f"dms.sizes: {name} = {size} is more than the dense model has, {bound.sizes[name]}. Lower it."
            )
    if config.prune is not None and set(config.prune) != set(sizes):
        raise HfDmsError(f"dms.sizes says what is pruned: {', '.join(sizes)}. Leave dms.prune out.")
    # The sizes as minimum, and their cost as target: exactly one state meets both.
    least = config.protect.get("min", {}) | sizes
    shaped = replace(config, target=1.0, prune=tuple(sizes), protect=config.protect | {"min": least})
    gates = build_gates(bound, model, shaped, device=torch.device("cpu"))
    smallest, cost = smallest_sizes(gates, bound, shaped, model.config)
    for name, size in sizes.items():
        leader = gates.dims[name].follows
        found = smallest[name] if leader is None else gates.following_units(name, smallest[leader])
        whole = bound.sizes[name]  # of a protected layer
        if not all(int(each) in (size, whole) for each in found):
            raise HfDmsError(
                f"dms.sizes: {name} cannot be {size} here, {int(found.min())} is nearest: dms.round_to, dms.protect or "
                "the stock config ask for it. Take that, loosen them, or use layout: per_layer."
            )
    share = cost / gates.dense_resource
    if config.target is not None and not math.isclose(config.target, share, rel_tol=1e-6):
        raise HfDmsError(
            f"dms.sizes keeps {share:.6g} of the dense {config.resource}, and dms.target asks for {config.target}. "
            "Leave dms.target out."
        )
    # One float above: cost / dense · dense may round to less than the cost, and the sizes would not fit.
    return replace(shaped, target=min(math.nextafter(share, 1.0), 1.0))
