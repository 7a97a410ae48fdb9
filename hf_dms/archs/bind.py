"""Binding: every parameter of a live model matched with its line of the architecture's description.

What the rest of the package needs of a model follows from the result: where masks go, what the model costs, how tensors
are sliced, what the config says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import nn

from ..errors import HfDmsError
from ..resource import Monomial
from .plain_view import names_by_tensor, plain_buffers, plain_parameters
from .spec import ArchSpec, Axes, Dim, parse_axes
from .stages import in_stages


@dataclass(frozen=True)
class BoundParam:
    """A parameter or buffer of a live model.

    Attributes:
        axes: the dims that each of its axes is a product of.
        layer: the layer of its stack that it belongs to, None outside the layers.
        stack: name of the depth dim of these layers, None outside the layers.
        positions: number of positions of a sequence at which its matmul runs, None for all.
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
        prefix: what precedes the base model's names, "model." for a LlamaForCausalLM, "" for a LlamaModel.
        sizes: units of every dim.
        params: every parameter of the model by name, tied ones under each of their names.
        buffers: every buffer of the model's state dict by name.
        tied: names that hold a tensor already listed under another name.
        fixed_layers: per stack the layers that are never dropped, since their parameters are not those of the others.
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
        """Names of the dims that a request can prune in this model: they are in its parameters, or layers may go."""
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
        """Layers of the one stack."""
        return self.sizes[self.depth]

    @property
    def layers_path(self) -> str:
        """Path of the one stack of layers, below the model."""
        return self.stacks[self.depth]

    @property
    def total_layers(self) -> int:
        """Layers of all stacks."""
        return sum(self.sizes[stack] for stack in self.stacks)

    def stack_of(self, name: str) -> str | None:
        """Depth dim of the layers that a dim is in; None for one that lies across or outside them."""
        dim = self.spec.dim(name)
        return dim.stack if dim.scope == "layer" else None

    def rows(self, name: str) -> int:
        """Independent sets of units of a dim: its layers, or 1."""
        stack = self.stack_of(name)
        return 1 if stack is None else self.sizes[stack]

    def layer_of(self, name: str) -> tuple[str | None, int | None]:
        """Depth dim of the stack, and index in it, of the layer that a parameter or module is in; None outside."""
        for depth, path in self.stacks.items():
            if name.startswith(f"{path}."):
                return depth, int(name.removeprefix(f"{path}.").partition(".")[0])
        return None, None

    def rows_without(self, name: str) -> list[int]:
        """Layers of a dim's stack whose parameters have nothing of it (what the first block of a stage has another)."""
        having = {param.layer for param in self.params.values() if any(name in axis for axis in param.axes)}
        return [row for row in range(self.rows(name)) if row not in having] if self.stack_of(name) else []

    def product(self, factors: str | tuple[str, ...]) -> int:
        """Size of a product of dims before pruning."""
        return prod(self.sizes[name] for name in (factors.split() if isinstance(factors, str) else factors))

    def monomial(self, factors: tuple[str, ...]) -> tuple[Monomial, float]:
        """Split a product of dims into the prunable dims and the number that the others amount to."""
        gated = tuple(sorted(name for name in factors if self.spec.dim(name).scope in ("layer", "model")))
        return gated, float(prod(self.sizes[name] for name in factors if name not in gated))


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
    spec, sizes = sized(spec, model.config)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    bound = BoundSpec(spec, prefix, sizes, {}, frozenset())
    kind = type(model).__name__
    shapes = {name: shape for name, _, shape in plain_parameters(model)}
    params, fixed = _bind_tensors(bound, kind, "parameter", shapes, spec.lines(kind))
    shapes = {name: tuple(buffer.shape) for name, buffer in plain_buffers(model)}
    buffers, _ = _bind_tensors(bound, kind, "buffer", shapes, spec.buffers)
    tied = frozenset(name for names in names_by_tensor(model).values() for name in names[1:])
    used = {factor for param in params.values() for axis in param.axes for factor in axis}
    # A stage of one layer has no dim that only other layers have, and no limit on it.
    lacking = {dim.name for dim in spec.dims if dim.scope in ("layer", "model")} - used
    limits = tuple(limit for limit in spec.must_equal if lacking.isdisjoint(" ".join(limit).split()))
    spec = spec if limits == spec.must_equal else replace(spec, must_equal=limits)
    return replace(bound, spec=spec, params=params, buffers=buffers, tied=tied, fixed_layers=fixed)


def _bind_tensors(
    bound: BoundSpec, class_name: str, what: str, shapes: dict[str, tuple[int, ...]], lines: dict[str, str]
) -> tuple[dict[str, BoundParam], dict[str, frozenset[int]]]:
    """Match tensors with their lines; with them come the layers that lines name by their numbers, per stack.

    Raises:
        ValueError: see `bind`.
    """
    model_type = bound.spec.model_type
    found: dict[str, BoundParam] = {}
    fixed: dict[str, set[int]] = {stack: set() for stack in bound.stacks}
    patterns = [(compiled(pattern), pattern) for pattern in lines]
    for name, shape in shapes.items():
        matches = [pattern for regex, pattern in patterns if regex.fullmatch(name.removeprefix(bound.prefix))]
        if len(matches) != 1:
            raise HfDmsError(
                f"{model_type}: {what} '{name}' {shape} matches {len(matches)} lines of the "
                f"description of a {class_name}, expected 1. Add or correct its line in the ArchSpec."
            )
        text = lines[matches[0]]
        axes = parse_axes(text)
        expected = tuple(prod(bound.sizes[factor] for factor in axis) for axis in axes)
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
    """Check that a model is of the kind that a description is of.

    Raises:
        ValueError: it is a backbone, or another architecture by what its config says.
    """
    if type(model).__name__.endswith("Backbone"):
        raise HfDmsError(
            f"{type(model).__name__} names its outputs after layers, which may be pruned. Load the base model instead."
        )
    for wanted, attributes in ((False, spec.must_be_false), (True, spec.must_be_true)):
        for attribute in attributes:
            if bool(value := getattr(model.config, attribute, wanted)) is not wanted:
                raise HfDmsError(
                    f"{spec.model_type} with {attribute} = {value} in its config is not supported, only with {wanted}."
                )


def sized(spec: ArchSpec, config: Any) -> tuple[ArchSpec, dict[str, int]]:
    """A description as it is of a model with this config, where dims that are one have one name, and their sizes."""
    spec = for_config(spec, config)
    sizes = {dim.name: dim_size(dim, config) for dim in spec.dims}
    for name in list(sizes):
        other = spec.dim(name).same_as  # by the name that it has by now
        if other is not None and sizes[name] == sizes[other]:
            spec = spec.with_one_name(name, other)
            del sizes[name]
    return spec, sizes


def for_config(spec: ArchSpec, config: Any) -> ArchSpec:
    """A description as it is of a model with this config: its variant, every stage written out."""
    return in_stages(spec.variant(config), num_stages(spec, config))


def num_stages(spec: ArchSpec, config: Any) -> int:
    """Stages of a model according to its config; 1 for an architecture without."""
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
    """A number, or what a config says: `"12"`, `"hidden_size"`, `"depths[1]"`."""
    if key.isdigit():
        return int(key)
    name, _, index = key.removesuffix("]").partition("[")
    value = getattr(config, name)
    return value[int(index)] if index else value


def _positions(text: str, sizes: dict[str, int]) -> int | None:
    """What follows the @ in a line, a number or a dim."""
    positions = text.partition("@")[2].strip()
    if not positions:
        return None
    return int(positions) if positions.isdigit() else sizes[positions]


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a parameter's or a module's name pattern: `{i}` is any layer, `{i>0}` not the first."""
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(re.escape("{i}"), r"\d+").replace(re.escape("{i>0}"), r"[1-9]\d*"))
