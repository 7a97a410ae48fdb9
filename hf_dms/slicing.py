"""Cut: a smaller model of the class that will be written, from the units that a plan keeps.

`prune` is the public entry: it rounds the gates to the exact budget, decides which units stay, builds the smaller model
and proves that it computes what the hard-masked one does. Slicing is `index_select` on the axes that the architecture's
description names; nothing here knows a module's name.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from . import modeling_dms
from .config import DMSConfig
from .gates import Gates
from .masking import attach_, detach_, gates_of, has_gates
from .resource import Sizes
from .rounding import has_alternative, round_sizes
from .spec import BoundSpec, parse_axes
from .topk import topk_mask

# Largest |difference| of outputs, relative to their largest magnitude, between a masked, a cut and a reloaded model:
# the same sums in another order. float64 is bounded by norms that transformers computes in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Plan:
    """Which units stay.

    Attributes:
        kept: per pruned dim one sorted index tensor per row (layer of the dense model, or the whole model).
    """

    kept: dict[str, tuple[Tensor, ...]]

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Units kept per pruned dim and row."""
        return {name: [len(row) for row in rows] for name, rows in self.kept.items()}


class VerificationError(RuntimeError):
    """Two models that must compute the same do not."""


def prune(
    model: PreTrainedModel, dms_config: DMSConfig | None = None, inputs: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Cut a model to its exact budget.

    Args:
        model: a model with gates (after a search), or, with `dms_config`, one without. It is left as it was.
        dms_config: for a model without gates: equal ratios for all dims, units chosen by weight magnitude.
        inputs: keyword arguments of one forward pass, on which the cut model is compared with the masked one.
            Default: transformers' dummy inputs.

    Returns:
        A smaller model of the class that will be written, in evaluation mode, on the same device.

    Raises:
        ValueError: the target cannot be reached.
        VerificationError: the cut model does not compute what the masked one does.
    """
    if not has_gates(model):
        if dms_config is None:
            raise ValueError("prune needs a model with gates (hf_dms.attach_), or a dms_config.")
        attach_(model, dms_config)
        try:
            return prune(model, inputs=inputs)
        finally:
            detach_(model)
    gates = gates_of(model)
    bound, config = gates.attachment.bound, gates.attachment.config
    searched = gates.num_updates > 0
    if not searched:
        warnings.warn(
            "prune: no search has run on these gates; units are chosen by weight magnitude, at equal ratios.",
            stacklevel=2,
        )
    with contextlib.nullcontext() if searched else _importance(gates, magnitude_importance(bound, model, gates)):
        sizes = round_sizes(gates, bound, config, model.config)
        plan = make_plan(gates, sizes)
        pruned = cut(model, bound, plan, config.layout)
        with hard_masked(model, sizes):
            inputs = inputs if inputs is not None else dummy_inputs(model)
            check_same(model, pruned, inputs, ("masked", "cut"), _output_units(model, bound, plan))
    return pruned


# ---- which units stay ---------------------------------------------------------------------------------------------------
def make_plan(gates: Gates, sizes: Sizes) -> Plan:
    """The most important units of every row, as many as `sizes` says (per dim `[rows]`)."""
    kept = {}
    for name, size in sizes.items():
        mask = topk_mask(gates.importance(name), size.to(gates.prune_ratio.device))
        kept[name] = tuple(row.nonzero().squeeze(-1).cpu() for row in mask)
    return Plan(kept)


@torch.no_grad()
def magnitude_importance(bound: BoundSpec, model: nn.Module, gates: Gates) -> dict[str, Tensor]:
    """Sum of squares of all weights that go with a unit, `[rows, units]` per gated dim."""
    importance = {name: torch.zeros(dim.rows, dim.units) for name, dim in gates.dims.items()}
    for name, parameter in model.named_parameters():
        param = bound.params.get(name)
        if param is None:
            continue
        squares = parameter.detach().float().square().cpu()
        if param.layer is not None and bound.depth in importance:
            importance[bound.depth][0, param.layer] += squares.sum()
        for place, axis in enumerate(param.axes):
            for dim in set(axis) & set(importance):
                row = param.layer if gates.dims[dim].rows > 1 else 0
                over_units = squares.movedim(place, 0).reshape([bound.sizes[factor] for factor in axis] + [-1])
                importance[dim][row] += over_units.movedim(axis.index(dim), 0).flatten(1).sum(1)
    return importance


@contextlib.contextmanager
def _importance(gates: Gates, importance: dict[str, Tensor]) -> Iterator[None]:
    """Let gates rank their units by another importance for a while."""
    before = {name: gates.raw_importance(name).clone() for name in importance}
    try:
        for name, values in importance.items():
            gates.raw_importance(name).copy_(values)
        yield
    finally:
        for name, values in before.items():
            gates.raw_importance(name).copy_(values)


# ---- cutting --------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def cut(model: PreTrainedModel, bound: BoundSpec, plan: Plan, layout: str) -> PreTrainedModel:
    """A new model that holds the kept units of another.

    Args:
        model: the dense model; its tensors are copied, not shared.
        bound: its architecture.
        plan: which units stay.
        layout: uniform or per_layer.
    """
    cls, config = pruned_class_and_config(model, bound, plan, layout)
    with initialization.no_init_weights():
        pruned = cls._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    kept_layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{pruned.base_model_prefix}." if bound.prefix else ""  # MistralForQuestionAnswering's is not Llama's
    for name, parameter in pruned.named_parameters():
        source = bound.prefix + name.removeprefix(prefix) if name.startswith(prefix) else name
        if (position := _layer_position(source, bound.layers_path)) is not None:
            head, tail = f"{bound.layers_path}.{position}.", f"{bound.layers_path}.{kept_layers[position]}."
            source = tail + source.removeprefix(head)
        tensor = slice_tensor(parameters[source].detach(), bound, source, plan)
        if tensor.shape != parameter.shape:
            raise VerificationError(f"cut: {name} is {tuple(parameter.shape)} in the new model, {tuple(tensor.shape)} cut.")
        parameter.data = tensor.clone()
    pruned.to(model.device)  # buffers
    pruned.tie_weights()
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


def slice_tensor(tensor: Tensor, bound: BoundSpec, name: str, plan: Plan) -> Tensor:
    """The part of a parameter that the plan keeps.

    Args:
        tensor: the whole parameter.
        bound: the architecture it belongs to.
        name: its name in the dense model.
        plan: which units stay.
    """
    param = bound.params[name]
    for place, axis in enumerate(param.axes):
        if any(factor in plan.kept for factor in axis):
            tensor = tensor.index_select(place, axis_indices(axis, bound, param.layer, plan).to(tensor.device))
    return tensor


def axis_indices(axis: tuple[str, ...], bound: BoundSpec, layer: int | None, plan: Plan) -> Tensor:
    """Kept positions along an axis that is a product of dims, in order."""
    indices = torch.zeros(1, dtype=torch.long)
    for factor in axis:
        kept = kept_units(plan, factor, layer, bound.sizes[factor])
        indices = (indices[:, None] * bound.sizes[factor] + kept).flatten()
    return indices


def kept_units(plan: Plan, name: str, layer: int | None, units: int) -> Tensor:
    """Units of a dim that stay in a layer (of the dense model); all of them if the dim is not pruned."""
    if name not in plan.kept:
        return torch.arange(units)
    rows = plan.kept[name]
    return rows[layer if layer is not None and len(rows) > 1 else 0]


def _layer_position(name: str, layers_path: str) -> int | None:
    if not name.startswith(f"{layers_path}."):
        return None
    return int(name.removeprefix(f"{layers_path}.").partition(".")[0])


# ---- what is written: class and config --------------------------------------------------------------------------------------
def pruned_class_and_config(
    model: PreTrainedModel, bound: BoundSpec, plan: Plan, layout: str
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and config of the cut model: the stock ones if all layers are equal, the per-layer ones otherwise."""
    kept_layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    per_layer = [config_values(bound, plan, layer) for layer in kept_layers]
    common = {key: max(values[key] for values in per_layer) for key in per_layer[0]}
    common[_config_key(bound, bound.depth)] = len(kept_layers)
    values = model.config.to_dict() | common
    for key in ("architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    if isinstance(values.get("layer_types"), list):
        values["layer_types"] = [values["layer_types"][layer] for layer in kept_layers]
    stock = type(model.config)
    overrides = {
        index: {key: value for key, value in layer_values.items() if value != common[key]}
        for index, layer_values in enumerate(per_layer)
    }
    overrides = {index: layer_values for index, layer_values in overrides.items() if layer_values}
    stock_can = _within_stock_limits(bound, common) or has_alternative(bound, model.config)
    if overrides or (layout == "per_layer" and not stock_can):
        config_class = modeling_dms.dms_config_class(stock)
        values |= {"model_type": config_class.model_type, "dms_layers": layer_description(bound)}
        values |= {"per_layer_config": overrides, "auto_map": modeling_dms.auto_map(stock)}
        return modeling_dms.dms_model_class(type(model)), config_class.from_dict(values)
    if _within_stock_limits(bound, common):
        return type(model), stock.from_dict(values)
    if not stock_can:
        raise ValueError(f"{stock.__name__} cannot express the sizes {common}. Use layout: per_layer.")
    return _alternative_class_and_config(type(model), stock, bound, values)


def config_values(bound: BoundSpec, plan: Plan, layer: int) -> dict[str, int]:
    """What the config says of one kept layer (of the dense model): attribute → size."""
    values = {}
    for key, product in bound.spec.config.items():
        if product != bound.depth:
            size = 1
            for factor in product.split():
                size *= len(kept_units(plan, factor, layer, bound.sizes[factor]))
            values[key] = size
    return values


def layer_description(bound: BoundSpec) -> dict:
    """What modeling_dms.py must know to build a layer from its sizes: the part of the description inside a layer."""
    spec, inside = bound.spec, f"{bound.spec.layers}.{{i}}."
    axes = {
        pattern.removeprefix(inside): axes
        for pattern, axes in spec.params.items()
        if pattern.startswith(inside) and bound.prefix + pattern.replace("{i}", "0") in bound.params
    }
    used = {factor for text in axes.values() for axis in parse_axes(text) for factor in axis}
    return {
        "path": spec.layers,
        "dims": {dim.name: dim.size for dim in spec.dims if dim.name in used},
        "axes": axes,
        "attributes": {pattern.removeprefix(inside): product for pattern, product in spec.attributes.items()},
    }


def _config_key(bound: BoundSpec, product: str) -> str:
    return next(key for key, value in bound.spec.config.items() if value == product)


def _within_stock_limits(bound: BoundSpec, common: dict[str, int]) -> bool:
    limits = [(_config_key(bound, a), _config_key(bound, b)) for a, b in bound.spec.must_divide]
    return all(common[multiple] % common[divisor] == 0 for divisor, multiple in limits)


def _alternative_class_and_config(cls: type, stock: type, bound: BoundSpec, values: dict):
    """The same model as another stock class that has fewer limits (Llama as Mistral)."""
    config_class = transformers.CONFIG_MAPPING[bound.spec.alternative]
    old, new = (config.__name__.removesuffix("Config") for config in (stock, config_class))
    drop = {"model_type", "pretraining_tp", *bound.spec.alternative_needs}
    values = {key: value for key, value in values.items() if key not in drop} | bound.spec.alternative_overrides
    return getattr(transformers, cls.__name__.replace(old, new)), config_class.from_dict(values)


# ---- proof --------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def hard_masked(model: PreTrainedModel, sizes: Sizes) -> Iterator[None]:
    """Run a model with gates in evaluation mode on hard masks of exactly these sizes for a while."""
    gates, training = gates_of(model), model.training
    gates.rounded = sizes
    model.eval()
    try:
        yield
    finally:
        gates.rounded = None
        model.train(training)


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs for one forward pass of any supported model."""
    inputs = {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items()}
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"] % model.config.vocab_size
    return inputs


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a model, or the last hidden state if it has no head."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}
    output = model(**inputs)
    return output["logits"] if "logits" in output else output[0]


def _output_units(model: PreTrainedModel, bound: BoundSpec, plan: Plan) -> Tensor | None:
    """Units of the last axis of a dense model's output that stay: a model without a head returns the residual stream."""
    streams = [rows[0] for name, rows in plan.kept.items() if bound.spec.dim(name).scope == "model"]
    return streams[0] if streams and model.base_model is model else None


def check_same(
    model: PreTrainedModel,
    other: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    names: tuple[str, str],
    units: Tensor | None = None,
) -> float:
    """Compare the outputs of two models on one batch.

    Args:
        model: the first one.
        other: the second one.
        inputs: keyword arguments of a forward pass.
        names: what to call them in an error.
        units: positions on the last axis of the first one's output that the second one has. Default: all.

    Returns:
        The largest |difference|, relative to the largest magnitude.

    Raises:
        VerificationError: it is above `TOLERANCE` for the model's dtype, or not a number.
    """
    expected, found = outputs_of(model, inputs).double(), outputs_of(other, inputs).double()
    if units is not None:
        expected = expected.index_select(-1, units.to(expected.device))
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
    tolerance = TOLERANCE[model.dtype]
    if not difference <= tolerance:
        raise VerificationError(
            f"The {names[1]} model does not compute what the {names[0]} model does: relative difference {difference:.2e}, "
            f"tolerance {tolerance:.0e} for {model.dtype}. Nothing was saved. Please report this with the model's config."
        )
    return difference
