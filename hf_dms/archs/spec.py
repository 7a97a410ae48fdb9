"""The language in which architectures are described.

An `ArchSpec` says, for each axis of each parameter, which named dims it is the product of, in the notation of einops.
bind.py matches the description with a live model. Nothing outside this room may know a module's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import HfDmsError
from .axes import LINE, flat, parse_axes


@dataclass(frozen=True)
class Dim:
    """A named size.

    Attributes:
        name: the word used in axis strings.
        size: config attribute (`"depths[1]"` for an entry of a list), `"a // b"` or `"a * b"` of two of them, a
            number, or a function of the config. For a dim of each stage, a function of the config and the `stage`.
        scope: "layer" (each layer has its own gate), "model" (one gate for the model), "depth" (the layers
            themselves) or "fixed" (never pruned).
        stack: for scope "layer", name of the depth dim of its layers.
        follows: name of the dim that decides how many units this one keeps. Its own importance decides which.
        same_as: another dim. If both have the same size in a config, they are the same axis and are pruned together.
    """

    name: str
    size: str | Callable[..., int]
    scope: str = "fixed"
    follows: str | None = None
    same_as: str | None = None
    stack: str = "layers"


def with_dims(dims: tuple[Dim, ...], *changed: Dim) -> tuple[Dim, ...]:
    """Dims with some replaced by others of the same name, and new ones added at the end."""
    # A dict, in which a replaced dim keeps its place: gates, ratios and reports go by the order of the dims.
    by_name = {dim.name: dim for dim in dims} | {dim.name: dim for dim in changed}
    return tuple(by_name.values())


@dataclass(frozen=True)
class ArchSpec:
    """Everything that hf_dms knows about an architecture.

    A network with stages is written once, with `{s}` for the stage in any text. Binding repeats the line for each stage
    (stages.py). "Pattern" below means a name with `{i}` for the layer, or `{i>0}` for any layer but the first.

    Attributes:
        model_type: the `model_type` of the config.
        layers: path of the list of layers, below the base model. For several stacks of layers, the path of each, by the
            name of its depth dim.
        dims: the named sizes. The dims with scope "depth" are the numbers of layers of the stacks.
        stages: number of stages, as a config attribute or a function of the config; None for a network without stages.
        families: words that name several dims, `"mlp"` → `("mlp0", "mlp1", ...)`. Binding adds those of stages.
        params: pattern of a parameter, below the base model or the model → its axes, e.g. `"(kv rep d) hidden"`. Where
            a map reads `torch.cat((x, y))`, the dims of x and y follow each other on one axis: `"out (a + b)"`. A layer
            that a line names by its number is never dropped. If a matrix product does not run at every token of a
            sequence, the number of positions follows an @: `"label pool @ 1"`, `"hidden channels height width @
            patches"`. Lines for parameters that a model lacks do no harm.
        buffers: the same for the buffers of the state dict, such as the running statistics of a batch norm; `""` for a
            single number. They are cut with their units, and never masked or counted.
        variants: config attribute → its value → the fields of this description that differ for such models.
        whole: modules, below the base model, that keep all of their tensors, whatever these are: a backbone with a
            config of its own. They have no lines.
        chained: stacks (by their depth dims) whose layers are called with something that follows from what the layer
            before returned, beside that. None of their layers is dropped.
        query_scores: a module, below the base model, that scores each place of an image for each class. The decoder's
            queries are the places with the largest scores, the largest one first. Empty if queries are weights.
        records_positions: whether the positions of all linear maps and convolutions are recorded from a forward pass of
            one image (positions.py). `params` then has none.
        heads: ending of a class name → lines of `params` that only classes with this ending have.
        config: config attribute (`"depths[1]"` for an entry of a list) → the product of dims that it holds.
        per_layer_only: whether the stock config does not hold every size that a cut could change. A cut model then has
            the per-layer format, and `config` names the sizes that the stock config holds, if any.
        config_ratios: attribute of the stock config → the two attributes of `config` whose quotient it is.
        config_lists: config attributes that are lists with an entry for each layer.
        config_leaves_out: config attributes that the config class computes itself from the number of layers.
        unnormed: modules, below the base model, with an output that enters the residual stream and is read there
            without a norm. That output is masked.
        channels_first: patterns of norms, below the base model, with units on axis 1 of their input.
        response_norms: patterns of modules, below the base model, that divide the norm of each unit over an image by
            the mean over all units (global response normalisation).
        masked_batch_norms: patterns of batch norms that are masked in place of all maps that read their units. Both are
            the same function if only ReLUs, sums and pools lie between them (these commute with a factor of at least
            0), and if every norm that writes the dim is listed.
        must_be_false: config flags of variants that this description does not support.
        must_be_true: config flags that a model must have, because this description does not support models without.
        must_have_one_entry: config lists that must have exactly one entry in a model that this description supports.
        attributes: `"module pattern.attribute"` → the product of dims that a module of a layer stores in this
            attribute, or a power of it, `"d ** -0.5"`. With `per_layer_only`, also a module outside the layers.
        by_number: `"module pattern.attribute"` → the value that the stock class gives this attribute of a layer, as a
            function of the config and the layer's number in its stack. A layer of a cut model keeps the value of its
            number in the dense model. Only with `per_layer_only` and stages.
        build_with: config values with which the stock class can be built for any sizes, if it checks its config.
        attention: product of dims of the attention output at one position, for the cost of attention scores.
        attentions: where queries and keys differ in number or lie in windows, in place of `attention`: pattern of a
            module → the product of dims that the cost of its attention scores is proportional to. It needs
            `records_positions`.
        cache: product of dims of the key (and of the value) at one position; None for a model without a cache.
        tokens: product of dims that is the number of tokens of a sequence; empty if the input decides.
        image: dims of the axes of an input image; empty for text.
        outputs: name of an output of the base model → the dims of its last axes (`_` for any other axis), if it is not
            the residual stream on the last axis: `"pool"`, `"hidden _ _"`.
        must_divide: `(a, b)`: in the stock config, the product a must divide the product b.
        must_equal: `(a, b)`: in the stock config, the product a must equal the dim b. a may not mention b.
        must_differ: `(a, b)`: sizes of a and b that must not become equal, because the stock class then drops a
            projection (ELECTRA).
        alternative: model_type with the same tensors and arithmetic, but without the limits of `must_divide`.
        alternative_overrides: config values for the alternative.
        alternative_needs: config attributes that must be false, because the alternative does not have them.
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
    whole: tuple[str, ...] = ()
    chained: tuple[str, ...] = ()
    query_scores: str = ""
    records_positions: bool = False
    per_layer_only: bool = False
    config_ratios: dict[str, tuple[str, str]] = field(default_factory=dict)
    config_lists: tuple[str, ...] = ("layer_types",)  # many decoders list each layer's attention: full or sliding
    config_leaves_out: tuple[str, ...] = ()
    unnormed: tuple[str, ...] = ()
    channels_first: tuple[str, ...] = ()
    response_norms: tuple[str, ...] = ()
    masked_batch_norms: tuple[str, ...] = ()
    must_be_false: tuple[str, ...] = ()
    must_be_true: tuple[str, ...] = ()
    must_have_one_entry: tuple[str, ...] = ()
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    by_number: dict[str, Callable[[Any, int], int]] = field(default_factory=dict)
    build_with: dict[str, int] = field(default_factory=dict)
    attention: str = ""
    attentions: dict[str, str] = field(default_factory=dict)
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
        # Where each line names its layer by number, as in a MobileNetV2, no layer can go.
        numbered = {depth for depth, path in self.stacks.items() if any(f"{path}.{{i" in name for name in self.params)}
        dropped = numbered - {*self.chained}
        found = [name for name in self.prunable if name in dropped or self.dim(name).scope != "depth"]
        return tuple(name for name in found if (of_all := re.sub(r"\d+$", "{s}", name)) == name or of_all not in found)

    def lines(self, class_name: str) -> dict[str, str]:
        """The lines of `params` and `heads` that apply to a model class."""
        # Heads need lines of their own because their names collide: BERT's `classifier.weight` reads the pooler in one
        # class and every token in another. Endings of names, because families share heads (BertFor..., RobertaFor...).
        head = next((head for head in self.heads if class_name.endswith(head)), None)
        return self.params if head is None else self.params | self.heads[head]

    def every_variant(self) -> list[ArchSpec]:
        """The descriptions of all variants; the first is that without the changes of any variant."""
        changes = [fields for by_value in self.variants.values() for fields in by_value.values()]
        return [replace(self, variants={}, **fields) for fields in ({}, *changes)]

    def variant(self, config: Any) -> ArchSpec:
        """The description of a model with this config."""
        changes: dict[str, Any] = {}
        for attribute, by_value in self.variants.items():
            changes |= by_value.get(getattr(config, attribute), {})
        return replace(self, variants={}, **changes) if self.variants else self

    def with_one_name(self, dim: str, name: str) -> ArchSpec:
        """A copy in which two dims are one: `dim` is removed, and `name` takes its place everywhere.

        Limits between the two are removed as well, because they now compare a dim with itself.
        """

        def renamed(text: str) -> str:
            return re.sub(rf"\b{dim}\b", name, text)  # whole words: `mid1` is not a part of `mid10`

        # Keys stay: they name modules and config attributes, which can be called like a dim (`mlp`).
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


# All fields that name dims, except `heads` and `cache`, which are handled separately.
DIM_LINKS = ("follows", "same_as")  # fields of a Dim
NAMED_PRODUCTS = ("params", "buffers", "config", "attributes", "attentions", "outputs")  # name → product
PRODUCTS = ("attention", "tokens", "image")
LIMITS = ("must_divide", "must_equal", "must_differ")  # pairs of products


def check_spec(spec: ArchSpec) -> None:
    """Check that a description mentions only dims, modules and config attributes that it defines, and has layers.

    Raises:
        ValueError: it mentions another one, or has no layers.
    """
    names = [dim.name for dim in spec.dims]
    for where, product in _products(spec):
        for factor in product.split():
            if factor not in names:
                raise HfDmsError(
                    f"{spec.model_type}: the entry '{where}' names '{factor}', which is none of the dims "
                    f"{', '.join(names)}. Correct it, or add the dim."
                )
    _check_stacks(spec)
    recorded = {factor for product in spec.config.values() for factor in product.split()}
    if spec.families:  # with stages, per-layer configs hold sizes by the names of dims
        recorded |= {factor for limit in spec.must_equal for product in limit for factor in product.split()}
    # With `per_layer_only` a cut model's config records the sizes itself, in `dms_layers`.
    for name in () if spec.per_layer_only else spec.prunable:
        if name not in recorded:
            raise HfDmsError(
                f"{spec.model_type}: '{name}' can be pruned, but no attribute in `config` holds its size, so the "
                "config of a cut model would lack it. Add it, or give the dim scope='fixed'."
            )
    _check_names(spec)


def _check_stacks(spec: ArchSpec) -> None:
    """Check that every stack of layers has a depth dim, and every dim with scope "layer" a stack."""
    if (depth := [dim.name for dim in spec.dims if dim.scope == "depth"]) != (stacks := list(spec.stacks)):
        raise HfDmsError(
            f"{spec.model_type}: one dim must have scope='depth' and be called {' and one '.join(stacks)}; got "
            f"{depth or 'none'}."
        )
    for depth_dim in spec.chained:
        if depth_dim not in stacks:
            raise HfDmsError(
                f"{spec.model_type}: `chained` mentions '{depth_dim}', which is none of {', '.join(stacks)}."
            )
    for dim in spec.dims:
        if dim.scope == "layer" and dim.stack not in stacks:
            raise HfDmsError(
                f"{spec.model_type}: dim '{dim.name}' has stack='{dim.stack}', which is none of {', '.join(stacks)}."
            )
    # Such values are saved among the sizes of layers in `dms_layers`, which only networks with stages have. And a stock
    # format would lose them: its class computes them from the new numbers.
    if spec.by_number and not (spec.per_layer_only and spec.families):
        raise HfDmsError(f"{spec.model_type}: `by_number` needs per_layer_only=True and stages.")


def _check_names(spec: ArchSpec) -> None:
    """Check that a description defines all config attributes and modules that it mentions."""
    quotients = [key for pair in spec.config_ratios.values() for key in pair]
    for where, keys in {"build_with": [*spec.build_with], "config_ratios": quotients}.items():
        for key in keys:
            if key not in spec.config and key not in spec.config_ratios:
                raise HfDmsError(
                    f"{spec.model_type}: `{where}` mentions '{key}', which `config` does not: {', '.join(spec.config)}."
                )
    weights = {re.sub(r"\d+", "#", name) for name in spec.params}  # numbers do not count: stages may differ in modules
    for key in ("unnormed", "channels_first", "response_norms", "masked_batch_norms"):
        for path in getattr(spec, key):
            if re.sub(r"\d+", "#", f"{path}.weight") not in weights:
                raise HfDmsError(f"{spec.model_type}: `{key}` mentions '{path}', but `params` has no '{path}.weight'.")
    # `parse_axes` takes any text: an unclosed bracket would silently become axes of their own.
    for where, text in _lines(spec):
        if text and not LINE.fullmatch(text):
            raise HfDmsError(
                f"{spec.model_type}: the entry '{where}' is '{text}', expected a list of axes, such as "
                "'(heads d) hidden', 'out (a + b)' or 'label pool @ 1'."
            )


def _lines(spec: ArchSpec) -> list[tuple[str, str]]:
    """Every parameter's and buffer's name and line."""
    return [
        *spec.params.items(),
        *spec.buffers.items(),
        *(line for head in spec.heads.values() for line in head.items()),
    ]


def _products(spec: ArchSpec) -> list[tuple[str, str]]:
    """Every product of dims in a description, with the name of its entry."""
    found = [(where, " ".join(flat(parse_axes(text)))) for where, text in _lines(spec)]
    found += [(where, at) for where, text in _lines(spec) if not (at := text.partition("@")[2].strip()).isdigit()]
    sizes = spec.config | spec.attributes | spec.attentions
    found += [(where, text.partition("**")[0]) for where, text in sizes.items()]
    found += [(where, text.replace("_ ", " ").removesuffix("_")) for where, text in spec.outputs.items()]
    found += [(key, getattr(spec, key)) for key in PRODUCTS] + [("cache", spec.cache or "")]
    found += [(key, product) for key in LIMITS for pair in getattr(spec, key) for product in pair]
    return found + [(dim.name, getattr(dim, key) or "") for dim in spec.dims for key in DIM_LINKS]
