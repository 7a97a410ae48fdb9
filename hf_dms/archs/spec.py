"""One description per architecture, and what it means for a live model.

An `ArchSpec` says which named dims each axis of each parameter is a product of, in einops' notation. Binding it to a
model checks every parameter against it and derives everything that the rest of the package needs: where masks go, what
the model costs, how tensors are sliced, what the config says. Nothing else may know a module's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import nn

from ..errors import HfDmsError
from ..resource import Monomial
from .plain_view import plain_parameters

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Dim:
    """A named size.

    Attributes:
        name: the word used in axis strings.
        size: config attribute, `"a // b"` of two of them, a number, or a function of the config.
        scope: "layer" (each layer has its own gate), "model" (one gate for the model), "depth" (the layers
            themselves) or "fixed" (never pruned).
        follows: name of the dim that decides how many units this one has; which ones, it decides itself.
        same_as: name of a dim that this one is, unit for unit, in models in which the two have one size.
    """

    name: str
    size: str | Callable[[Any], int]
    scope: str = "fixed"
    follows: str | None = None
    same_as: str | None = None


def with_dims(dims: tuple[Dim, ...], *changed: Dim) -> tuple[Dim, ...]:
    """Dims of which some are replaced by others of the same names, or added."""
    by_name = {dim.name: dim for dim in dims} | {dim.name: dim for dim in changed}
    return tuple(by_name.values())


@dataclass(frozen=True)
class ArchSpec:
    """Everything that hf_dms knows about an architecture.

    Attributes:
        model_type: the config's.
        layers: path of the list of layers, below the base model.
        dims: the named sizes. The one with scope "depth" is the number of layers.
        params: parameter name pattern, below the base model or the model (`{i}` is the layer), to its axes, e.g.
            `"(kv rep d) hidden"`. A matmul that does not run at every token of a sequence says at how many positions it
            does: `"label pool @ 1"`, `"hidden channels height width @ patches"`. Names of parameters that a variant
            lacks do no harm.
        heads: what ends the name of a class to the lines of `params` that only such classes have.
        config: config attribute to the product of dims that it holds.
        config_ratios: attribute of the stock config to the two attributes of `config` that it is the quotient of.
        config_lists: config attributes that are lists with an entry for each layer.
        config_leaves_out: config attributes that the config works out itself from the number of layers.
        unnormed: modules, below the base model, whose output enters the residual stream and is read there without a
            norm, so that it is masked itself.
        must_be_false: config attributes that make another architecture of it, which this description is not of.
        attributes: `"module pattern.attribute"` to the product of dims that a module of a layer remembers in it, or
            a power of it, `"d ** -0.5"`.
        build_with: config values with which the stock class builds whatever the sizes, if it checks them.
        attention: product of dims that one position's attention output has, for the cost of attention scores.
        cache: product of dims that one position's key (and value) has; None for a model without a cache.
        tokens: product of dims that is the number of tokens of a sequence; empty where the input decides.
        image: dims of the axes of an input image; empty for text.
        must_divide: `(a, b)`: in the stock config the product a must divide the product b.
        must_equal: `(a, b)`: in the stock config the product a must be the dim b.
        must_differ: `(a, b)`: if the fixed dim a and the dim b have one size, the stock class is another architecture.
        alternative: model_type that has the same tensors and maths without the limits of `must_divide`.
        alternative_overrides: config values that make it so.
        alternative_needs: config attributes that must be false for the alternative to be the same.
    """

    model_type: str
    layers: str
    dims: tuple[Dim, ...]
    params: dict[str, str]
    config: dict[str, str]
    config_ratios: dict[str, tuple[str, str]] = field(default_factory=dict)
    config_lists: tuple[str, ...] = ("layer_types",)
    config_leaves_out: tuple[str, ...] = ()
    unnormed: tuple[str, ...] = ()
    must_be_false: tuple[str, ...] = ()
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    build_with: dict[str, int] = field(default_factory=dict)
    attention: str = ""
    cache: str | None = None
    tokens: str = ""
    image: str = ""
    must_divide: tuple[tuple[str, str], ...] = ()
    must_equal: tuple[tuple[str, str], ...] = ()
    must_differ: tuple[tuple[str, str], ...] = ()
    alternative: str | None = None
    alternative_overrides: dict[str, Any] = field(default_factory=dict)
    alternative_needs: tuple[str, ...] = ()

    def dim(self, name: str) -> Dim:
        return next(dim for dim in self.dims if dim.name == name)

    @property
    def prunable(self) -> tuple[str, ...]:
        """Names of the dims that a request can prune."""
        return tuple(dim.name for dim in self.dims if dim.scope != "fixed" and dim.follows is None)

    def lines(self, class_name: str) -> dict[str, str]:
        """The lines of `params` and `heads` that hold for a model class."""
        head = next((head for head in self.heads if class_name.endswith(head)), None)
        return self.params if head is None else self.params | self.heads[head]

    def with_one_name(self, dim: str, name: str) -> ArchSpec:
        """The same with another name in place of a dim's, of which it is a dim no more."""

        def rename(lines: dict[str, str]) -> dict[str, str]:
            return {key: re.sub(rf"\b{dim}\b", name, line) for key, line in lines.items()}

        return replace(
            self,
            dims=tuple(other for other in self.dims if other.name != dim),
            params=rename(self.params),
            heads={head: rename(lines) for head, lines in self.heads.items()},
            config=rename(self.config),
            must_differ=tuple(pair for pair in self.must_differ if dim not in pair),
        )


@dataclass(frozen=True)
class BoundParam:
    """A parameter of a live model.

    Attributes:
        axes: the dims that each of its axes is a product of.
        layer: the layer that it belongs to, None outside the layers.
        positions: number of positions of a sequence at which its matmul runs, None for all.
    """

    axes: Axes
    layer: int | None
    positions: int | None = None


@dataclass(frozen=True)
class BoundSpec:
    """An `ArchSpec` bound to a model.

    Attributes:
        spec: the description.
        prefix: what precedes the base model's names, "model." for a LlamaForCausalLM, "" for a LlamaModel.
        sizes: units of every dim.
        params: every parameter of the model by name, tied ones under each of their names.
        tied: names that hold a tensor already listed under another name.
    """

    spec: ArchSpec
    prefix: str
    sizes: dict[str, int]
    params: dict[str, BoundParam]
    tied: frozenset[str]

    @property
    def depth(self) -> str:
        return next(dim.name for dim in self.spec.dims if dim.scope == "depth")

    @property
    def num_layers(self) -> int:
        return self.sizes[self.depth]

    @property
    def layers_path(self) -> str:
        return self.prefix + self.spec.layers

    def rows(self, name: str) -> int:
        """Independent sets of units of a dim: its layers, or 1."""
        return self.num_layers if self.spec.dim(name).scope == "layer" else 1

    def product(self, factors: str | tuple[str, ...]) -> int:
        """Size of a product of dims before pruning."""
        return prod(self.sizes[name] for name in (factors.split() if isinstance(factors, str) else factors))

    def monomial(self, factors: tuple[str, ...]) -> tuple[Monomial, float]:
        """Split a product of dims into the prunable dims and the number that the others amount to."""
        gated = tuple(sorted(name for name in factors if self.spec.dim(name).scope in ("layer", "model")))
        return gated, float(prod(self.sizes[name] for name in factors if name not in gated))


def parse_axes(text: str) -> Axes:
    """`"(kv rep d) hidden"` → `(("kv", "rep", "d"), ("hidden",))`; what follows an @ is left out."""
    return tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", text.partition("@")[0]))


def flat(axes: Axes) -> tuple[str, ...]:
    """All dims of a parameter's axes, in order."""
    return tuple(name for axis in axes for name in axis)


def bind(spec: ArchSpec, model: nn.Module) -> BoundSpec:
    """Match every parameter of a model with its line of the description.

    Args:
        spec: the description.
        model: a `PreTrainedModel`; the meta device will do.

    Raises:
        ValueError: a variant of the architecture that the description is not of, a parameter that no line or several
            lines describe, or whose shape is not the product of its dims.
    """
    _check_variant(spec, model)
    sizes = {dim.name: dim_size(dim, model.config) for dim in spec.dims}
    for dim in spec.dims:
        if dim.same_as is not None and sizes[dim.name] == sizes[dim.same_as]:
            spec = spec.with_one_name(dim.name, dim.same_as)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    lines = [(_compile(pattern), text) for pattern, text in spec.lines(type(model).__name__).items()]
    params: dict[str, BoundParam] = {}
    owners: dict[int, str] = {}
    tied = set()
    for name, parameter, shape in plain_parameters(model):
        matches = [(m, text) for regex, text in lines if (m := regex.fullmatch(name.removeprefix(prefix)))]
        if len(matches) != 1:
            raise HfDmsError(
                f"{spec.model_type}: parameter '{name}' {shape} matches {len(matches)} lines of the "
                f"description of a {type(model).__name__}, expected 1. Add or correct its line in the ArchSpec."
            )
        match, text = matches[0]
        axes = parse_axes(text)
        expected = tuple(prod(sizes[factor] for factor in axis) for axis in axes)
        if shape != expected:
            raise HfDmsError(
                f"{spec.model_type}: parameter '{name}' has shape {shape}, but its description "
                f"'{text}' means {expected}. Correct it in the ArchSpec."
            )
        layer = match.groupdict().get("i")
        params[name] = BoundParam(axes, None if layer is None else int(layer), _positions(text, sizes))
        if owners.setdefault(id(parameter), name) != name:
            tied.add(name)
    return BoundSpec(spec, prefix, sizes, params, frozenset(tied))


def _check_variant(spec: ArchSpec, model: nn.Module) -> None:
    """Check that a model is of the kind that a description is of.

    Raises:
        ValueError: it is a backbone, or another architecture by what its config says.
    """
    if type(model).__name__.endswith("Backbone"):
        raise HfDmsError(
            f"{type(model).__name__} names its outputs after layers, which may be pruned. Load the base model instead."
        )
    for attribute in spec.must_be_false:
        if value := getattr(model.config, attribute, False):
            raise HfDmsError(
                f"{spec.model_type} with {attribute} = {value} in its config is not supported, only with False."
            )


def check_spec(spec: ArchSpec) -> None:
    """Check that a description speaks of its own dims only, and has layers.

    Raises:
        ValueError: it does not.
    """
    names = [dim.name for dim in spec.dims]
    lines = [*spec.params.items(), *(line for head in spec.heads.values() for line in head.items())]
    products = [(name, " ".join(flat(parse_axes(text)))) for name, text in lines]
    products += [(name, text.partition("**")[0]) for name, text in (spec.config | spec.attributes).items()]
    for name, product in products:
        for factor in product.split():
            if factor not in names:
                raise HfDmsError(
                    f"{spec.model_type}: what is said of '{name}' names '{factor}', which is none of the dims "
                    f"{', '.join(names)}. Correct it, or add the dim."
                )
    if (depth := [dim.name for dim in spec.dims if dim.scope == "depth"]) != ["layers"]:
        raise HfDmsError(
            f"{spec.model_type}: one dim must have scope='depth' and be called layers; got {depth or 'none'}."
        )


def dim_size(dim: Dim, config: Any) -> int:
    """Size of a dim according to a config."""
    if callable(dim.size):
        return dim.size(config)
    if dim.size.isdigit():
        return int(dim.size)
    values = [getattr(config, name.strip()) for name in dim.size.split("//")]
    return values[0] if len(values) == 1 else values[0] // values[1]


def _positions(text: str, sizes: dict[str, int]) -> int | None:
    """What follows the @ in a line, a number or a dim."""
    positions = text.partition("@")[2].strip()
    if not positions:
        return None
    return int(positions) if positions.isdigit() else sizes[positions]


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"))
