"""Binding: match every parameter of a live model with its line in the architecture's description.

Everything that the rest of the package needs to know about a model follows from the result: the places of masks, the
cost of the model, the slices of tensors, the values of the config.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import nn

from ..errors import HfDmsError
from ..resource import Monomial
from .axes import Axes, Axis, flat, parse_axes, terms
from .plain_view import names_by_tensor, plain_buffers, plain_parameters
from .spec import ArchSpec, Dim
from .stages import in_stages


@dataclass(frozen=True)
class BoundParam:
    """A parameter or buffer of a live model.

    Attributes:
        axes: for each axis, the dims whose product it is; `+` is between products that follow each other on it.
        layer: index of its layer in the stack, None outside the layers.
        stack: name of the depth dim of its stack, None outside the layers.
        positions: number of positions of a sequence at which its matrix product runs, None for all.
    """

    axes: Axes
    layer: int | None
    positions: int | None = None
    stack: str | None = None


@dataclass(frozen=True)
class BoundSpec:
    """An `ArchSpec` bound to a model.

    Attributes:
        spec: the description.
        prefix: prefix of the base model's names, "model." for a LlamaForCausalLM, "" for a LlamaModel.
        sizes: units of every dim.
        params: every parameter of the model by name, tied ones under each of their names.
        buffers: every buffer of the model's state dict by name.
        tied: further names of tied tensors; the first name of a tensor is not among them.
        fixed_layers: per stack, the layers that are never dropped, because they have other parameters than the rest.
    """

    spec: ArchSpec
    prefix: str
    sizes: dict[str, int]
    params: dict[str, BoundParam]
    tied: frozenset[str]
    buffers: dict[str, BoundParam] = field(default_factory=dict)
    fixed_layers: dict[str, frozenset[int]] = field(default_factory=dict)

    @property
    def prunable(self) -> list[str]:
        """Names of the dims that can be pruned here: dims of the parameters, and stacks with droppable layers."""
        used = {factor for param in self.params.values() for axis in param.axes for factor in axis}
        used |= {stack for stack in self.stacks if len(self.fixed_layers.get(stack, ())) < self.sizes[stack]}
        return [name for name in self.spec.prunable if name in used]

    def tensor(self, name: str) -> BoundParam:
        """A parameter or a buffer."""
        return self.params[name] if name in self.params else self.buffers[name]

    @property
    def stacks(self) -> dict[str, str]:
        """Path of each stack of layers, below the model, by the name of its depth dim."""
        return {depth: self.prefix + path for depth, path in self.spec.stacks.items()}

    @property
    def depth(self) -> str:
        """The depth dim of the one stack of layers.

        Raises:
            ValueError: the model has several.
        """
        if len(self.spec.stacks) > 1:
            raise HfDmsError(
                f"{self.spec.model_type} has several stacks of layers ({', '.join(self.spec.stacks)}), and this works "
                "on models with one only. Search over masks (dms.search_over: masks), or choose by another strategy."
            )
        return next(iter(self.spec.stacks))

    @property
    def num_layers(self) -> int:
        """Number of layers of the only stack."""
        return self.sizes[self.depth]

    @property
    def layers_path(self) -> str:
        """Path of the only stack of layers, below the model."""
        return self.stacks[self.depth]

    @property
    def total_layers(self) -> int:
        """Number of layers of all stacks."""
        return sum(self.sizes[stack] for stack in self.stacks)

    def stack_of(self, name: str) -> str | None:
        """Depth dim of the layers that own a dim; None for a dim that no layer owns."""
        dim = self.spec.dim(name)
        return dim.stack if dim.scope == "layer" else None

    def rows(self, name: str) -> int:
        """Number of independent sets of units of a dim: the number of its layers, or 1."""
        stack = self.stack_of(name)
        return 1 if stack is None else self.sizes[stack]

    def layer_of(self, name: str) -> tuple[str | None, int | None]:
        """Depth dim of the stack, and index in the stack, of a parameter's or module's layer; None outside layers."""
        for depth, path in self.stacks.items():
            if name.startswith(f"{path}."):
                return depth, int(name.removeprefix(f"{path}.").partition(".")[0])
        return None, None

    def is_whole(self, name: str) -> bool:
        """Whether a tensor lies in a module that keeps all of its tensors."""
        return name.startswith(tuple(f"{self.prefix}{path}." for path in self.spec.whole))

    def rows_without(self, name: str) -> list[int]:
        """Layers of a dim's stack without this dim (the first block of a stage can have another one in its place)."""
        having = {param.layer for param in self.params.values() if any(name in axis for axis in param.axes)}
        return [row for row in range(self.rows(name)) if row not in having] if self.stack_of(name) else []

    def product(self, factors: str | Axis) -> int:
        """Size of a product of dims, or of an axis, before pruning."""
        axis = tuple(factors.split()) if isinstance(factors, str) else factors
        return sum(prod(self.sizes[name] for name in term) for term in terms(axis))

    def monomial(self, factors: tuple[str, ...]) -> tuple[Monomial, float]:
        """Split a product of dims into its prunable dims and the product of the sizes of the others."""
        # Sorted, so that the terms of q_proj (kv hidden) and o_proj (hidden kv) add up to one.
        gated = tuple(sorted(name for name in factors if self.spec.dim(name).scope in ("layer", "model")))
        return gated, float(prod(self.sizes[name] for name in factors if name not in gated))


def bind(spec: ArchSpec, model: nn.Module) -> BoundSpec:
    """Match every parameter of a model with its line in the description.

    Args:
        spec: the description.
        model: a `PreTrainedModel`; the meta device will do.

    Raises:
        ValueError: the description does not support this variant; or no line, or several lines, match a parameter; or
            its shape is not the product of its dims.
    """
    # First: otherwise an unsupported variant would be reported as a parameter without a line.
    _check_variant(spec, model)
    spec, sizes = sized(spec, model.config)
    _check_stacks(spec, sizes)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    bound = BoundSpec(spec, prefix, sizes, {}, frozenset())  # still without tensors: matching them needs the rest of it
    kind = type(model).__name__
    shapes = {name: shape for name, _, shape in plain_parameters(model)}
    params, fixed = _bind_tensors(bound, kind, "parameter", shapes, spec.lines(kind))
    fixed |= {stack: frozenset(range(sizes[stack])) for stack in spec.chained}
    shapes = {name: tuple(buffer.shape) for name, buffer in plain_buffers(model)}
    buffers, _ = _bind_tensors(bound, kind, "buffer", shapes, spec.buffers)
    tied = frozenset(name for names in names_by_tensor(model).values() for name in names[1:])
    used = {factor for param in params.values() for axis in param.axes for factor in axis}
    # A stage of one layer has no dim that only other layers have, and no limit on it.
    lacking = {dim.name for dim in spec.dims if dim.scope in ("layer", "model")} - used
    limits = tuple(limit for limit in spec.must_equal if lacking.isdisjoint(" ".join(limit).split()))
    spec = spec if limits == spec.must_equal else replace(spec, must_equal=limits)
    factors = [name for param in (*params.values(), *buffers.values()) for name in flat(param.axes)]
    numbers = {name: int(name) for name in factors if name.isdigit()}  # of tensors that stay whole
    spec = replace(spec, dims=(*spec.dims, *(Dim(name, name) for name in numbers))) if numbers else spec
    sizes |= numbers
    return replace(bound, spec=spec, sizes=sizes, params=params, buffers=buffers, tied=tied, fixed_layers=fixed)


def _bind_tensors(
    bound: BoundSpec, class_name: str, what: str, shapes: dict[str, tuple[int, ...]], lines: dict[str, str]
) -> tuple[dict[str, BoundParam], dict[str, frozenset[int]]]:
    """Match tensors with their lines.

    Returns:
        The bound tensors by name; and per stack the layers that lines name by their numbers.

    Raises:
        ValueError: see `bind`.
    """
    model_type = bound.spec.model_type
    found: dict[str, BoundParam] = {}
    fixed: dict[str, set[int]] = {stack: set() for stack in bound.stacks}
    patterns = tuple(lines)
    for name, shape in shapes.items():
        if bound.is_whole(name):  # each axis is a fixed dim with its size for a name
            found[name] = BoundParam(tuple((str(size),) for size in shape), None)
            continue
        # A head's names have no prefix, so its lines stand beside those of the base model.
        matches = _matching(patterns, name.removeprefix(bound.prefix))
        if len(matches) != 1:
            raise HfDmsError(
                f"{model_type}: {what} '{name}' {shape} matches {len(matches)} lines of the "
                f"description of a {class_name}, expected 1. docs/architectures.md says which classes and variants are "
                "covered. In an ArchSpec of your own, add or correct its line."
            )
        text = lines[matches[0]]
        axes = parse_axes(text)
        expected = tuple(bound.product(axis) for axis in axes)
        if shape != expected:
            raise HfDmsError(
                f"{model_type}: {what} '{name}' has shape {shape}, but its description "
                f"'{text}' means {expected}. Correct it in the ArchSpec."
            )
        stack, layer = bound.layer_of(name)
        found[name] = BoundParam(axes, layer, _positions(text, bound.sizes), stack)
        if stack is not None and layer is not None and "{i" not in matches[0]:
            fixed[stack].add(layer)
    return found, {stack: frozenset(layers) for stack, layers in fixed.items()}


def _check_variant(spec: ArchSpec, model: nn.Module) -> None:
    """Check that a description supports the variant that a model is.

    Raises:
        ValueError: the model is a backbone, or its config has a flag, that the description does not support.
    """
    if (kind := type(model).__name__).endswith("Backbone") and "Backbone" not in spec.heads:
        raise HfDmsError(
            f"{kind} names its outputs after layers, which may be pruned, or takes their widths from a config that "
            "cannot hold pruned ones. Load the base model instead."
        )
    for wanted, attributes in ((False, spec.must_be_false), (True, spec.must_be_true)):
        for attribute in attributes:
            if bool(value := getattr(model.config, attribute, wanted)) is not wanted:
                raise HfDmsError(
                    f"{spec.model_type} with {attribute} = {value} in its config is not supported, only with {wanted}."
                )
    for attribute in spec.must_have_one_entry:
        if len(entries := getattr(model.config, attribute)) != 1:
            raise HfDmsError(
                f"{spec.model_type} with {attribute} = {list(entries)} in its config is not supported, only with one "
                "entry."
            )


def _check_stacks(spec: ArchSpec, sizes: dict[str, int]) -> None:
    """Check that every stack of layers has a layer.

    Raises:
        ValueError: one has none.
    """
    for depth, path in spec.stacks.items():
        if sizes[depth] < 1:
            raise HfDmsError(
                f"{spec.model_type} with {sizes[depth]} layers in '{path}' ({depth}), as its config says, is not "
                "supported, only with at least one."
            )


def sized(spec: ArchSpec, config: Any) -> tuple[ArchSpec, dict[str, int]]:
    """The description for a model with this config, with dims merged that are the same (`same_as`), and their sizes."""
    spec = for_config(spec, config)
    sizes = {dim.name: dim_size(dim, config) for dim in spec.dims}
    for name in list(sizes):
        other = spec.dim(name).same_as  # by the name that it has by now
        if other is not None and sizes[name] == sizes[other]:
            spec = spec.with_one_name(name, other)
            del sizes[name]
    return spec, sizes


def for_config(spec: ArchSpec, config: Any) -> ArchSpec:
    """The description for a model with this config: the right variant, with every stage written out."""
    # The variant first: what it changes mentions `{s}` as well.
    return in_stages(spec.variant(config), num_stages(spec, config))


def num_stages(spec: ArchSpec, config: Any) -> int:
    """Number of stages of a model according to its config; 1 for an architecture without stages."""
    if spec.stages is None:
        return 1
    return spec.stages(config) if callable(spec.stages) else getattr(config, spec.stages)


def dim_size(dim: Dim, config: Any) -> int:
    """Size of a dim according to a config."""
    if callable(dim.size):
        return dim.size(config)
    left, operator, right = re.fullmatch(r"\s*([^\s*/]+)\s*(//|\*|)\s*(.*?)\s*", dim.size).groups()  # type: ignore[union-attr]
    first = config_value(config, left)
    if not operator:
        return first
    second = config_value(config, right)
    return first * second if operator == "*" else first // second


def config_value(config: Any, key: str) -> int:
    """A number, or a value of a config: `"12"`, `"hidden_size"`, `"depths[1]"`."""
    if key.isdigit():
        return int(key)
    name, _, index = key.removesuffix("]").partition("[")
    value = getattr(config, name)
    return value[int(index)] if index else value


def _positions(text: str, sizes: dict[str, int]) -> int | None:
    """The number of positions after the @ in a line, which is a number or a dim."""
    positions = text.partition("@")[2].strip()
    if not positions:
        return None
    return int(positions) if positions.isdigit() else sizes[positions]


@functools.lru_cache(maxsize=10_000)  # a model is bound several times: by attach_, by prune, when it is saved
def _matching(patterns: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if compiled(pattern).fullmatch(name))


@functools.cache  # re keeps 512 expressions, and the descriptions have more
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression for a pattern of names: `{i}` stands for any layer, `{i>0}` for any but the first."""
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(re.escape("{i}"), r"\d+").replace(re.escape("{i>0}"), r"[1-9]\d*"))
