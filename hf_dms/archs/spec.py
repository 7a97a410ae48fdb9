"""The language that architectures are described in.

An `ArchSpec` says which named dims each axis of each parameter is a product of, in einops' notation. bind.py matches it
with a live model. Nothing outside this room may know a module's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import HfDmsError

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Dim:
    """A named size.

    Attributes:
        name: the word used in axis strings.
        size: config attribute (`"depths[1]"` for an entry of a list), `"a // b"` or `"a * b"` of two of them, a
            number, or a function of the config; of the config and the `stage` for a dim of each stage.
        scope: "layer" (each layer has its own gate), "model" (one gate for the model), "depth" (the layers
            themselves) or "fixed" (never pruned).
        stack: name of the depth dim of the layers that a dim with scope "layer" is in.
        follows: name of the dim that decides how many units this one has; which ones, it decides itself.
        same_as: name of a dim that this one is, unit for unit, in models in which the two have one size.
    """

    name: str
    size: str | Callable[..., int]
    scope: str = "fixed"
    follows: str | None = None
    same_as: str | None = None
    stack: str = "layers"


def with_dims(dims: tuple[Dim, ...], *changed: Dim) -> tuple[Dim, ...]:
    """Dims of which some are replaced by others of the same names, or added."""
    by_name = {dim.name: dim for dim in dims} | {dim.name: dim for dim in changed}
    return tuple(by_name.values())


@dataclass(frozen=True)
class ArchSpec:
    """Everything that hf_dms knows about an architecture.

    A network in stages is written once, with `{s}` for the stage in any text: binding repeats the line for each stage
    (stages.py).

    Attributes:
        model_type: the config's.
        layers: path of the list of layers, below the base model; for several stacks of layers, that of each by the
            name of its depth dim.
        dims: the named sizes. Those with scope "depth" are the numbers of layers of the stacks.
        stages: number of stages, a config attribute or a function of the config; None for a network without.
        families: words for all dims of a kind, `"mlp"` → `("mlp0", "mlp1", ...)`; binding fills it in.
        params: parameter name pattern, below the base model or the model (`{i}` is the layer, `{i>0}` any but the
            first), to its axes, e.g. `"(kv rep d) hidden"`. A layer that a line names by its number is never dropped. A
            matmul that does not run at every token of a sequence says at how many positions it does: `"label pool @
            1"`, `"hidden channels height width @ patches"`. Names of parameters that a variant lacks do no harm.
        buffers: the same for the tensors of the state dict that are no parameters, such as the running statistics of a
            batch norm; `""` for a single number. They are cut with their units, and never masked or counted.
        variants: config attribute to its values to the fields that a model with this value has instead.
        records_positions: the positions of every linear map and convolution are those of a forward pass of one image
            (positions.py), and `params` says none.
        heads: what ends the name of a class to the lines of `params` that only such classes have.
        config: config attribute, `"depths[1]"` for an entry of a list, to the product of dims that it holds. Empty
            where a stock config holds no sizes that a cut could change: a cut model is per-layer then.
        config_ratios: attribute of the stock config to the two attributes of `config` that it is the quotient of.
        config_lists: config attributes that are lists with an entry for each layer.
        config_leaves_out: config attributes that the config works out itself from the number of layers.
        unnormed: modules, below the base model, whose output enters the residual stream and is read there without a
            norm, so that it is masked itself.
        channels_first: patterns of norms, below the base model, whose units are on axis 1 of their input.
        response_norms: patterns of modules, below the base model, that divide the norm of each unit over an image by
            the mean of all units' (global response normalisation).
        masked_batch_norms: patterns of batch norms that take the mask of their units in the place of all maps that read
            these. That is the same function where nothing lies between the two but ReLUs, sums and pools, which commute
            with a factor of at least 0, and where every norm that writes the dim is among them.
        must_be_false: config attributes that make another architecture of it, which this description is not of.
        must_be_true: config attributes without which it is another architecture.
        attributes: `"module pattern.attribute"` to the product of dims that a module of a layer remembers in it, or
            a power of it, `"d ** -0.5"`; a module outside the layers, where `config` is empty.
        build_with: config values with which the stock class builds whatever the sizes, if it checks them.
        attention: product of dims that one position's attention output has, for the cost of attention scores.
        cache: product of dims that one position's key (and value) has; None for a model without a cache.
        tokens: product of dims that is the number of tokens of a sequence; empty where the input decides.
        image: dims of the axes of an input image; empty for text.
        outputs: name of an output of the base model to the dims of its last axes (`_` for any other), where that is not
            the residual stream on the last one: `"pool"`, `"hidden _ _"`.
        must_divide: `(a, b)`: in the stock config the product a must divide the product b.
        must_equal: `(a, b)`: in the stock config the product a must be the dim b, which it may not mention.
        must_differ: `(a, b)`: if the fixed dim a and the dim b have one size, the stock class is another architecture.
        alternative: model_type that has the same tensors and maths without the limits of `must_divide`.
        alternative_overrides: config values that make it so.
        alternative_needs: config attributes that must be false for the alternative to be the same.
    """

    model_type: str
    layers: str | dict[str, str]
    dims: tuple[Dim, ...]
    params: dict[str, str]
    config: dict[str, str]
    stages: str | Callable[[Any], int] | None = None
    families: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    variants: dict[str, dict[Any, dict[str, Any]]] = field(default_factory=dict)
    records_positions: bool = False
    config_ratios: dict[str, tuple[str, str]] = field(default_factory=dict)
    config_lists: tuple[str, ...] = ("layer_types",)
    config_leaves_out: tuple[str, ...] = ()
    unnormed: tuple[str, ...] = ()
    channels_first: tuple[str, ...] = ()
    response_norms: tuple[str, ...] = ()
    masked_batch_norms: tuple[str, ...] = ()
    must_be_false: tuple[str, ...] = ()
    must_be_true: tuple[str, ...] = ()
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    build_with: dict[str, int] = field(default_factory=dict)
    attention: str = ""
    cache: str | None = None
    tokens: str = ""
    image: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    must_divide: tuple[tuple[str, str], ...] = ()
    must_equal: tuple[tuple[str, str], ...] = ()
    must_differ: tuple[tuple[str, str], ...] = ()
    alternative: str | None = None
    alternative_overrides: dict[str, Any] = field(default_factory=dict)
    alternative_needs: tuple[str, ...] = ()

    def dim(self, name: str) -> Dim:
        return next(dim for dim in self.dims if dim.name == name)

    @property
    def stacks(self) -> dict[str, str]:
        """Path of each stack of layers, below the base model, by the name of its depth dim."""
        return {"layers": self.layers} if isinstance(self.layers, str) else self.layers

    @property
    def prunable(self) -> tuple[str, ...]:
        """Names of the dims that a request can prune."""
        return tuple(dim.name for dim in self.dims if dim.scope != "fixed" and dim.follows is None)

    @property
    def prunable_in_words(self) -> tuple[str, ...]:
        """The same in words: one name for the dims of all stages, and no depth where no layer can be dropped."""
        dropped = {depth for depth, path in self.stacks.items() if any(f"{path}.{{i" in name for name in self.params)}
        found = [name for name in self.prunable if name in dropped or self.dim(name).scope != "depth"]
        return tuple(name for name in found if (of_all := re.sub(r"\d+$", "{s}", name)) == name or of_all not in found)

    def lines(self, class_name: str) -> dict[str, str]:
        """The lines of `params` and `heads` that hold for a model class."""
        head = next((head for head in self.heads if class_name.endswith(head)), None)
        return self.params if head is None else self.params | self.heads[head]

    def every_variant(self) -> list[ArchSpec]:
        """The descriptions of all variants, first of that of the other fields."""
        changes = [fields for by_value in self.variants.values() for fields in by_value.values()]
        return [replace(self, variants={}, **fields) for fields in ({}, *changes)]

    def variant(self, config: Any) -> ArchSpec:
        """The description of a model with this config."""
        changes: dict[str, Any] = {}
        for attribute, by_value in self.variants.items():
            changes |= by_value.get(getattr(config, attribute), {})
        return replace(self, variants={}, **changes) if self.variants else self

    def with_one_name(self, dim: str, name: str) -> ArchSpec:
        """The same with another dim's name in the place of a dim's, which goes: the two are one.

        Limits between the two hold by themselves then, or never will, and go too.
        """

        def renamed(text: str) -> str:
            return re.sub(rf"\b{dim}\b", name, text)

        def lines(of: dict[str, str]) -> dict[str, str]:
            return {key: renamed(text) for key, text in of.items()}

        def pairs(of: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
            both = [(renamed(a), renamed(b)) for a, b in of]
            return tuple(pair for pair in both if pair[0] != pair[1])

        def linked(other: Dim) -> Dim:
            links: dict[str, Any] = {key: name for key in DIM_LINKS if getattr(other, key) == dim}
            return replace(other, **links)

        changes: dict[str, Any] = {key: lines(getattr(self, key)) for key in NAMED_PRODUCTS}
        changes |= {key: renamed(getattr(self, key)) for key in PRODUCTS}
        changes |= {key: pairs(getattr(self, key)) for key in LIMITS}
        changes["heads"] = {head: lines(of) for head, of in self.heads.items()}
        changes["families"] = {word: tuple(n for n in names if n != dim) for word, names in self.families.items()}
        changes["cache"] = None if self.cache is None else renamed(self.cache)
        return replace(self, dims=tuple(linked(other) for other in self.dims if other.name != dim), **changes)


# Where dims are named, beside `heads` and `cache`, whose lines and product may be missing.
DIM_LINKS = ("follows", "same_as")  # of a Dim
NAMED_PRODUCTS = ("params", "buffers", "config", "attributes", "outputs")  # name → product
PRODUCTS = ("attention", "tokens", "image")
LIMITS = ("must_divide", "must_equal", "must_differ")  # pairs of products


def parse_axes(text: str) -> Axes:
    """`"(kv rep d) hidden"` → `(("kv", "rep", "d"), ("hidden",))`; what follows an @ is left out."""
    return tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", text.partition("@")[0]))


def flat(axes: Axes) -> tuple[str, ...]:
    """All dims of a parameter's axes, in order."""
    return tuple(name for axis in axes for name in axis)


def check_spec(spec: ArchSpec) -> None:
    """Check that a description speaks of its own dims, modules and config attributes only, and has layers.

    Raises:
        ValueError: it does not.
    """
    names = [dim.name for dim in spec.dims]
    for where, product in _products(spec):
        for factor in product.split():
            if factor not in names:
                raise HfDmsError(
                    f"{spec.model_type}: what is said of '{where}' names '{factor}', which is none of the dims "
                    f"{', '.join(names)}. Correct it, or add the dim."
                )
    _check_stacks(spec)
    recorded = {factor for product in spec.config.values() for factor in product.split()}
    if spec.families:  # stages, whose per-layer configs hold sizes by the names of dims
        recorded |= {factor for limit in spec.must_equal for product in limit for factor in product.split()}
    for name in spec.prunable if spec.config else ():
        if name not in recorded:
            raise HfDmsError(
                f"{spec.model_type}: '{name}' can be pruned, but no attribute in `config` holds its size, so that a "
                "cut model's config would not say it. Add it, or give the dim scope='fixed'."
            )
    _check_names(spec)


def _check_stacks(spec: ArchSpec) -> None:
    """Check that every stack of layers has its depth dim, and every layer's dim its stack."""
    if (depth := [dim.name for dim in spec.dims if dim.scope == "depth"]) != (stacks := list(spec.stacks)):
        raise HfDmsError(
            f"{spec.model_type}: one dim must have scope='depth' and be called {' and one '.join(stacks)}; got "
            f"{depth or 'none'}."
        )
    for dim in spec.dims:
        if dim.scope == "layer" and dim.stack not in stacks:
            raise HfDmsError(
                f"{spec.model_type}: dim '{dim.name}' has stack='{dim.stack}', which is none of {', '.join(stacks)}."
            )


def _check_names(spec: ArchSpec) -> None:
    """Check that config attributes and modules that a description mentions are those that it describes."""
    quotients = [key for pair in spec.config_ratios.values() for key in pair]
    for where, keys in {"build_with": [*spec.build_with], "config_ratios": quotients}.items():
        for key in keys:
            if key not in spec.config and key not in spec.config_ratios:
                raise HfDmsError(
                    f"{spec.model_type}: `{where}` mentions '{key}', which `config` does not: {', '.join(spec.config)}."
                )
    weights = {re.sub(r"\d+", "#", name) for name in spec.params}  # not every stage has every module
    for key in ("unnormed", "channels_first", "response_norms", "masked_batch_norms"):
        for path in getattr(spec, key):
            if re.sub(r"\d+", "#", f"{path}.weight") not in weights:
                raise HfDmsError(f"{spec.model_type}: `{key}` mentions '{path}', but `params` has no '{path}.weight'.")
    for where, text in _lines(spec):
        if text and not re.fullmatch(r"(\(\w+( \w+)*\)|\w+)( (\(\w+( \w+)*\)|\w+))*( @ \w+)?", text):
            raise HfDmsError(
                f"{spec.model_type}: '{text}', said of '{where}', is no list of axes, such as '(heads d) hidden' or "
                "'label pool @ 1'."
            )


def _lines(spec: ArchSpec) -> list[tuple[str, str]]:
    """Every parameter's and buffer's name and line."""
    return [
        *spec.params.items(),
        *spec.buffers.items(),
        *(line for head in spec.heads.values() for line in head.items()),
    ]


def _products(spec: ArchSpec) -> list[tuple[str, str]]:
    """Everything in a description that is a product of dims, and what it is said of."""
    found = [(where, " ".join(flat(parse_axes(text)))) for where, text in _lines(spec)]
    found += [(where, at) for where, text in _lines(spec) if not (at := text.partition("@")[2].strip()).isdigit()]
    found += [(where, text.partition("**")[0]) for where, text in (spec.config | spec.attributes).items()]
    found += [(where, text.replace("_ ", " ").removesuffix("_")) for where, text in spec.outputs.items()]
    found += [(key, getattr(spec, key)) for key in PRODUCTS] + [("cache", spec.cache or "")]
    found += [(key, product) for key in LIMITS for pair in getattr(spec, key) for product in pair]
    return found + [(dim.name, getattr(dim, key) or "") for dim in spec.dims for key in DIM_LINKS]
