"""What is written: the class and the config of a cut model.

The stock ones if all layers are equal or padded to the widest (or another stock class with the same tensors and fewer
limits), the per-layer ones of modeling_dms.py otherwise.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.skeleton import config_as_tied
from ..archs.spec import parse_axes
from ..archs.stock import has_alternative, padded_sizes, product_of, within_limits
from ..errors import HfDmsError
from . import modeling_dms
from .plan import Plan, kept_layers, kept_units


def pruned_class_and_config(
    model: PreTrainedModel, bound: BoundSpec, plan: Plan, layout: str
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and config of the cut model: the stock ones if all layers are equal, the per-layer ones otherwise.

    Raises:
        ValueError: no stock config can express the sizes, and the layout asks for one.
    """
    sizes = written_sizes(bound, plan, layout, model.config)
    per_layer = [config_values(bound, layer_sizes) for layer_sizes in sizes]
    common = {key: max(values[key] for values in per_layer) for key in per_layer[0]}
    values = config_as_tied(model).to_dict() | common
    for key in (
        "architectures",
        "auto_map",
        "transformers_version",
        "quantization_config",
        *bound.spec.config_leaves_out,
    ):
        values.pop(key, None)
    for key in bound.spec.config_lists:
        if isinstance(values.get(key), list):
            values[key] = [values[key][layer] for _, layer in kept_layers(plan, bound)]
    cls: Any = type(model)
    stock: Any = type(model.config)
    overrides = {
        index: {key: value for key, value in layer_values.items() if value != common[key]}
        for index, layer_values in enumerate(per_layer)
    }
    overrides = {index: layer_values for index, layer_values in overrides.items() if layer_values}
    fits = within_limits(bound.spec, sizes[0])
    stock_can = fits or has_alternative(bound.spec, model.config)
    if overrides or (layout == "per_layer" and not stock_can):
        config_class = modeling_dms.dms_config_class(stock)
        values |= {"model_type": config_class.model_type, "dms_layers": layer_description(bound)}
        values |= {"per_layer_config": overrides, "auto_map": modeling_dms.auto_map(stock)}
        return modeling_dms.dms_model_class(cls), config_class.from_dict(values)
    if fits:
        values |= {key: values[over] // values[under] for key, (over, under) in bound.spec.config_ratios.items()}
        return cls, stock.from_dict(values)
    if not stock_can:
        raise HfDmsError(f"{stock.__name__} cannot express the sizes {common}. Use layout: per_layer.")
    return _alternative_class_and_config(cls, stock, bound, values)


def written_sizes(bound: BoundSpec, plan: Plan, layout: str, model_config: Any) -> list[dict[str, int]]:
    """Units of every dim in each layer of the cut model: those that stay, and for layout padded the zeros beside them.

    Args:
        bound: the architecture.
        plan: which units stay.
        layout: uniform, per_layer or padded.
        model_config: the dense model's config.
    """
    layers = [
        {
            name: len(kept_units(plan, name, layer, units))
            for name, units in bound.sizes.items()
            if bound.stack_of(name) in (None, stack)
        }
        for stack, layer in kept_layers(plan, bound)
    ]
    return layers if layout != "padded" else [padded_sizes(bound, layers, model_config)] * len(layers)


def config_values(bound: BoundSpec, sizes: dict[str, int]) -> dict[str, int]:
    """What the config says of a layer of these sizes: attribute → size."""
    return {key: product_of(sizes, product) for key, product in bound.spec.config.items()}


def layer_description(bound: BoundSpec) -> dict[str, Any]:
    """What modeling_dms.py must know to build a layer from its sizes: the part of the description inside a layer."""
    spec, path = bound.spec, bound.spec.stacks[bound.depth]
    inside = f"{path}.{{i}}."
    axes = {
        pattern.removeprefix(inside): axes
        for pattern, axes in spec.params.items()
        if pattern.startswith(inside) and bound.prefix + pattern.replace("{i}", "0") in bound.params
    }
    used = {factor for text in axes.values() for axis in parse_axes(text) for factor in axis}
    recorded = {product: key for key, product in spec.config.items()}
    dims = {dim.name: recorded.get(dim.name, dim.size) for dim in spec.dims if dim.name in used}
    return {
        "path": path,
        "dims": {name: str(bound.sizes[name]) if callable(size) else size for name, size in dims.items()},
        "axes": axes,
        "attributes": {pattern.removeprefix(inside): product for pattern, product in spec.attributes.items()},
        "build_with": spec.build_with,
    }


def _alternative_class_and_config(cls: Any, stock: Any, bound: BoundSpec, values: dict[str, Any]) -> tuple[Any, Any]:
    """The same model as another stock class that has fewer limits (Llama as Mistral)."""
    config_class = transformers.CONFIG_MAPPING[str(bound.spec.alternative)]
    old, new = (config.__name__.removesuffix("Config") for config in (stock, config_class))
    drop = {"model_type", "pretraining_tp", *bound.spec.alternative_needs}
    values = {key: value for key, value in values.items() if key not in drop} | bound.spec.alternative_overrides
    return getattr(transformers, cls.__name__.replace(old, new)), config_class.from_dict(values)
