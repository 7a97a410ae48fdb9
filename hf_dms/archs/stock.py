"""What a stock config can express: one size per dim for all layers, and limits between sizes.

The limits are data of the description (`must_divide`, `must_equal`, `must_differ`, `alternative`). This file answers
all questions about them: which dims must be pruned together, which sizes are allowed, how far to pad, which class can
hold a result, and what the documentation says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..config import DMSConfig
from ..errors import HfDmsError
from .axes import flat, parse_axes, terms
from .bind import BoundSpec
from .spec import ArchSpec


@dataclass(frozen=True)
class Divisor:
    """`unit · size(dim)` must divide the size of `multiple`."""

    dim: str
    unit: int
    multiple: str


def has_alternative(spec: ArchSpec, model_config: Any) -> bool:
    """Whether a model can be written as another stock class that has no `must_divide` limits.

    Args:
        spec: the architecture.
        model_config: the dense model's config.
    """
    return spec.alternative is not None and not any(
        getattr(model_config, name, False) for name in spec.alternative_needs
    )


def prunable_factor(spec: ArchSpec, product: str) -> str:
    """The only dim of a product that is not fixed: `"kv rep"` → `"kv"`."""
    fixed = {dim.name for dim in spec.dims if dim.scope == "fixed"}
    # The documentation's table asks this of descriptions whose stages are not written out: `{s-1}` names no dim there.
    (name,) = [name for name in product.split() if name.replace("{s-1}", "{s}") not in fixed]
    return name


def product_of(sizes: Mapping[str, int], product: str) -> int:
    """Size of a product of dims, for sizes other than the dense ones."""
    return prod(sizes[name] for name in product.split())


def held_by_fixed(spec: ArchSpec) -> dict[str, str]:
    """Dims that a stock config ties to a size that is never pruned, and that size. Uniform layers keep them whole."""
    return {prunable_factor(spec, part): whole for part, whole in spec.must_equal if spec.dim(whole).scope == "fixed"}


# ---- what a search may end at ----------------------------------------------------------------------------------------
def tied_sizes(bound: BoundSpec, config: DMSConfig, pruned: Collection[str]) -> dict[str, str]:
    """Pruned dims whose size another pruned dim decides (`must_equal`), and that other dim.

    Args:
        bound: the architecture.
        config: the request. Only layout uniform ties dims; in the others each layer has its own sizes.
        pruned: names of the dims that the request prunes.

    Raises:
        ValueError: layout uniform, and the request prunes only one of two dims that must be pruned together.
    """
    leaders = {}
    held = held_by_fixed(bound.spec) if config.layout == "uniform" else {}
    for part in (name for name in held if name in pruned):
        raise HfDmsError(
            f"layout uniform: the stock config of {bound.spec.model_type} needs {held[part]} = "
            f"{bound.sizes[held[part]] // bound.sizes[part]}·{part}, and {held[part]} cannot be pruned, so {part} "
            "cannot either. Leave it out of dms.prune, or use layout: per_layer or padded."
        )
    for product, whole in bound.spec.must_equal if config.layout == "uniform" else ():
        part = prunable_factor(bound.spec, product)
        if bound.product(product) != bound.sizes[whole] and {part, whole} & set(pruned):
            raise HfDmsError(
                f"layout uniform: this {bound.spec.model_type} has {bound.sizes[whole]} units of {whole}, and "
                f"{bound.product(product)} of '{product}', which a search keeps equal. Use layout: per_layer."
            )
        if part in pruned and whole in pruned:
            # The factor leads: each number of heads gives a hidden size, but few hidden sizes a number of heads.
            leaders[whole] = part
        elif part in pruned or whole in pruned:
            # For a residual stream the message does not advise padded, because `check_padding` would refuse it next.
            layouts = "per_layer" if whole in pruned else "per_layer or padded"
            raise HfDmsError(
                f"layout uniform: the stock config of {bound.spec.model_type} needs {whole} = "
                f"{bound.sizes[whole] // bound.sizes[part]}·{part}, so {part} and {whole} can only be pruned together. "
                f"Prune both, or use layout: {layouts}."
            )
    return leaders


def divisors(bound: BoundSpec, config: DMSConfig, model_config: Any, gated: Collection[str]) -> list[Divisor]:
    """The divisibility limits for layout uniform; the other layouts have none.

    If another stock class can hold any sizes (Mistral for Llama), the limit of the dense model's class is respected
    only when the multiple (`hidden`) can adapt at little cost: it is pruned too, and has no `round_to`.

    Args:
        bound: the architecture.
        config: the request.
        model_config: the dense model's config.
        gated: names of the dims that have gates.
    """
    if config.layout != "uniform":
        return []
    found = []
    for product, multiple in bound.spec.must_divide:
        dim = prunable_factor(bound.spec, product)
        free = multiple in gated and config.round_to.get(multiple, 1) == 1
        if (dim in gated or multiple in gated) and (free or not has_alternative(bound.spec, model_config)):
            found.append(Divisor(dim, bound.product(product) // bound.sizes[dim], multiple))
    return found


def excluded_sizes(bound: BoundSpec, leaders: Mapping[str, str | None]) -> dict[str, int]:
    """Per dim the size at which the stock class would drop a projection, if there is such a size (`must_differ`).

    Args:
        bound: the architecture.
        leaders: every gated dim, with the dim that it follows in size, or None.
    """
    excluded: dict[str, int] = {}
    for fixed, name in bound.spec.must_differ:
        if name in leaders:
            # In units of the leader, because a search changes the leader's size. With a remainder, no such size exists.
            leader = leaders[name] or name
            size, rest = divmod(bound.sizes[fixed] * bound.sizes[leader], bound.sizes[name])
            excluded |= {leader: size} if rest == 0 else {}
    return excluded


# ---- padding to equal layers -----------------------------------------------------------------------------------------
def check_layout(bound: BoundSpec, layout: str, pruned: Collection[str], model_config: Any) -> None:
    """Check that a layout can be written.

    Args:
        bound: the architecture.
        layout: uniform, per_layer or padded.
        pruned: names of the dims that the request prunes.
        model_config: the dense model's config.

    Raises:
        ValueError: a stock config is asked for that does not hold all sizes, and see `check_padding`.
    """
    if layout != "per_layer" and bound.spec.per_layer_only:
        raise HfDmsError(
            f"layout {layout}: the stock config of {bound.spec.model_type} does not hold all widths, its class derives "
            "them. Use layout: per_layer."
        )
    if layout == "padded":
        check_padding(bound, pruned, model_config)


def check_padding(bound: BoundSpec, pruned: Collection[str], model_config: Any) -> None:
    """Check that padded layers will have a stock config.

    The widths of a layer can be padded. A residual stream cannot, because its norms would count the zeros. So if the
    stock config ties the two together, the residual stream must not be pruned.

    Args:
        bound: the architecture.
        pruned: names of the dims that the request prunes.
        model_config: the dense model's config.

    Raises:
        ValueError: the request prunes a residual stream that the stock config ties to the layers' widths, or a width
            over which a module takes a mean; or a width of a layer that a parameter has beside other units.
    """
    spec = bound.spec
    sums = (axis for param in bound.params.values() for axis in param.axes if len(terms(axis)) > 1)
    beside = {name for axis in sums for name in axis if name != "+" and spec.dim(name).scope == "layer"}
    if cannot := beside.intersection(pruned):
        others = ", ".join(name for name in spec.prunable if name not in beside and spec.dim(name).scope != "model")
        raise HfDmsError(
            f"layout padded: the zeros stand at the end of an axis, and a parameter of {spec.model_type} has other "
            f"units behind those of {min(cannot)}, or in front. Prune others only, as prune: [{others}], or use "
            "layout: per_layer."
        )
    averaged = {flat(parse_axes(spec.params[f"{path}.weight"]))[-1] for path in spec.response_norms}
    if cannot := averaged.intersection(pruned):
        others = ", ".join(name for name in spec.prunable if name not in averaged and spec.dim(name).scope != "model")
        raise HfDmsError(
            f"layout padded: a module of {spec.model_type} divides by a mean over {min(cannot)}, which would count the "
            f"zeros. Prune others only, as prune: [{others}], or use layout: per_layer."
        )
    limits = spec.must_equal + (() if has_alternative(spec, model_config) else spec.must_divide)
    streams = {whole: product for product, whole in limits} | {
        prunable_factor(spec, product): whole for product, whole in spec.must_equal
    }
    for stream, other in streams.items():
        if stream in pruned and spec.dim(stream).scope == "model":
            others = ", ".join(name for name in spec.prunable if name not in streams or spec.dim(name).scope != "model")
            raise HfDmsError(
                f"layout padded: the stock config of {spec.model_type} ties {stream} to '{other}', and {stream} cannot "
                f"be padded. Prune others only, as prune: [{others}], or use layout: per_layer."
            )


def padded_sizes(bound: BoundSpec, layers: list[dict[str, int]], model_config: Any) -> dict[str, int]:
    """The smallest sizes that hold every layer and that a stock config allows, if there are any.

    Args:
        bound: the architecture.
        layers: kept units of every dim, layer by layer.
        model_config: the dense model's config.
    """
    sizes = widest(layers)
    if has_alternative(bound.spec, model_config):
        return sizes  # the other class has no limits
    for _ in bound.spec.must_equal:  # repeat, because one limit can change a size that another one mentions
        for product, whole in bound.spec.must_equal:
            if product_of(sizes, product) != sizes[whole]:  # the dense sizes fulfil every limit
                tied = [*product.split(), whole]
                sizes |= {name: bound.sizes[name] for name in tied if bound.spec.dim(name).scope == "layer"}
    for name in sizes:
        if bound.spec.dim(name).scope == "layer":
            # The dense size is allowed, and between two multiples of a divisor there are fewer steps than that size.
            wider = range(sizes[name], sizes[name] + bound.sizes[name] + 1)
            allowed = (size for size in wider if within_limits(bound.spec, sizes | {name: size}, name))
            sizes[name] = next(allowed, sizes[name])  # none fits: `pruned_class_and_config` has the message
    return sizes


def widest(layers: list[dict[str, int]]) -> dict[str, int]:
    """The largest size of every dim over all layers. A layer need not have every dim."""
    return {name: max(layer[name] for layer in layers if name in layer) for sizes in layers for name in sizes}


# ---- what can hold given sizes ---------------------------------------------------------------------------------------
def within_limits(spec: ArchSpec, sizes: Mapping[str, int], name: str | None = None) -> bool:
    """Whether the stock config can express the sizes of equal layers.

    Args:
        spec: the architecture.
        sizes: units of every dim.
        name: consider only the limits that mention this dim. Default: all limits.
    """

    def concerned(limit: tuple[str, str]) -> bool:
        return name is None or name in " ".join(limit).split()

    divide, equal = filter(concerned, spec.must_divide), filter(concerned, spec.must_equal)
    return all(product_of(sizes, multiple) % product_of(sizes, divisor) == 0 for divisor, multiple in divide) and all(
        product_of(sizes, product) == product_of(sizes, whole) for product, whole in equal
    )


def limits_in_words(spec: ArchSpec) -> list[str]:
    """The limits of an architecture's stock config, for documentation (Markdown)."""
    held = held_by_fixed(spec)
    limits = [f"without {', '.join(f'`{name}`' for name in held)}"] if held else []
    limits += [
        f"`{prunable_factor(spec, part)}` and `{whole}` only together"
        for part, whole in spec.must_equal
        if whole not in held.values()
    ]
    attributes = {product: key for key, product in spec.config.items()}
    for divisor, multiple in spec.must_divide:
        names = [f"`{attributes.get(product, product.replace(' ', '·'))}`" for product in (divisor, multiple)]
        otherwise = f", else written as `{spec.alternative}`" if spec.alternative else ""
        limits.append(f"{names[1]} a multiple of {names[0]}{otherwise}")
    return limits


# ---- values of the config --------------------------------------------------------------------------------------------
def config_values(spec: ArchSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """The values of a config for a layer of these sizes, or for a model with equal layers: attribute → value."""
    return {key: product_of(sizes, product) for key, product in spec.config.items()}


def with_values(config: dict[str, Any], values: dict[str, int]) -> dict[str, Any]:
    """A copy of a config (as a mapping) with new values, by attribute or by `"name[index]"` for a list's entry."""
    config = dict(config)
    for key, value in values.items():
        name, _, index = key.removesuffix("]").partition("[")
        if index:
            config[name] = [*config[name][: int(index)], value, *config[name][int(index) + 1 :]]
        else:
            config[name] = value
    return config
