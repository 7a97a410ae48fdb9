"""The class and the config of a cut model.

If all layers have equal sizes, or are padded to the widest one, a stock class can hold them: that of the dense model,
or another stock class with the same tensors and fewer limits (Mistral for Llama). Otherwise the per-layer classes of
modeling_dms.py hold them.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..archs.axes import flat, parse_axes
from ..archs.bind import BoundSpec, compiled
from ..archs.skeleton import config_as_tied
from ..archs.stock import config_values, has_alternative, padded_sizes, widest, with_values, within_limits
from ..errors import HfDmsError
from . import modeling_dms
from .plan import Plan, kept_layers, kept_units

# Keys of the dense config that describe its own class or files, and would be wrong for the cut model.
NOT_TAKEN_OVER = ("architectures", "auto_map", "transformers_version", "quantization_config")


def pruned_class_and_config(
    model: PreTrainedModel, bound: BoundSpec, plan: Plan, layout: str
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and config of the cut model.

    Args:
        model: the dense model.
        bound: its architecture.
        plan: which units stay.
        layout: uniform, per_layer or padded.

    Raises:
        ValueError: no stock config can express the sizes, and the layout asks for one.
    """
    sizes = written_sizes(bound, plan, layout, model.config)
    largest = widest(sizes)
    common = config_values(bound.spec, largest)
    values = with_values(config_as_tied(model).to_dict(), common)
    for key in (*NOT_TAKEN_OVER, *bound.spec.config_leaves_out):
        values.pop(key, None)
    # Lists with an entry per layer, such as the kinds of attention: the entries of dropped layers go.
    for key in bound.spec.config_lists:
        if isinstance(values.get(key), list):
            values[key] = [values[key][layer] for _, layer in kept_layers(plan, bound)]
    cls: Any = type(model)
    stock: Any = type(model.config)
    differ = any(largest[name] != size for layer in sizes for name, size in layer.items())
    # A class that derives widths can only hold those that it derives: the dense model's.
    cut_at_all = any(bound.sizes[name] != size for name, size in largest.items())
    fits = not cut_at_all if bound.spec.per_layer_only else within_limits(bound.spec, largest)
    stock_can = fits or has_alternative(bound.spec, model.config)
    # layout per_layer is written as a stock model too, where the search happens to end with equal layers: more runtimes
    # load it. Equal layers may still break a limit of the stock class (heads that do not divide hidden).
    if differ or (layout == "per_layer" and not stock_can):
        config_class = modeling_dms.dms_config_class(stock)
        values |= {"model_type": config_class.model_type, "auto_map": modeling_dms.auto_map(stock)}
        values |= per_layer_values(bound, _with_numbered(bound, plan, sizes, model.config), common)
        return modeling_dms.dms_model_class(cls), config_class.from_dict(values)
    # Some configs hold a quotient in place of a size (DINOv2: the MLP's width over the hidden size).
    if fits:
        values |= {key: values[over] // values[under] for key, (over, under) in bound.spec.config_ratios.items()}
        return cls, stock.from_dict(values)
    if not stock_can:
        raise HfDmsError(f"{stock.__name__} cannot express the sizes {common}. Use layout: per_layer.")
    return _alternative_class_and_config(cls, stock, bound, values)


def written_sizes(bound: BoundSpec, plan: Plan, layout: str, model_config: Any) -> list[dict[str, int]]:
    """Units of every dim in each layer of the cut model. For layout padded the zeros count as units.

    Args:
        bound: the architecture.
        plan: which units stay.
        layout: uniform, per_layer or padded.
        model_config: the dense model's config.
    """
    # A layer has the dims of its own stack, and those that belong to no stack, such as hidden.
    # The list is over kept layers only, so its places are those of the cut model.
    layers = [
        {
            name: len(kept_units(plan, name, layer, units))
            for name, units in bound.sizes.items()
            if bound.stack_of(name) in (None, stack) and name not in {*bound.stacks} - {stack}
        }
        for stack, layer in kept_layers(plan, bound)
    ]
    if layout != "padded":
        return layers
    padded = padded_sizes(bound, layers, model_config)
    return [{name: padded[name] for name in layer} for layer in layers]


def per_layer_values(bound: BoundSpec, sizes: list[dict[str, int]], common: dict[str, int]) -> dict[str, Any]:
    """The keys that a per-layer config has beside those of a stock config.

    `per_layer_config` is transformers' own schema: for each layer, the values that differ from the common ones.
    `dms_layers` says how to build a layer from its sizes. The schema cannot describe networks with stages, so their
    layers' sizes are in `dms_layers` as well.

    Args:
        bound: the architecture.
        sizes: units of every dim in each layer of the cut model, and its values of `by_number`.
        common: the values of the stock config, which hold for all layers.
    """
    if not bound.spec.families:
        per_layer = [config_values(bound.spec, layer_sizes) for layer_sizes in sizes]
        overrides = {
            index: {key: value for key, value in layer_values.items() if value != common[key]}
            for index, layer_values in enumerate(per_layer)
        }
        # transformers reads a layer without an entry as one with the common values.
        overrides = {index: layer_values for index, layer_values in overrides.items() if layer_values}
        outside = _outside_layers(bound, sizes[0])
        return {"per_layer_config": overrides, "dms_layers": layer_description(bound) | outside}
    stacks = []
    for stack in bound.stacks:
        description = _inside_layers(bound, stack)
        # `written_sizes` gives each layer the dims of its own stack only, so the stack's name tells them apart.
        mine = [layer for layer in sizes if stack in layer]
        used = [_dims_of(_of_one_layer(description, place)) for place in range(len(mine))]
        recorded = [{name: layer[name] for name in names} for layer, names in zip(mine, used)]
        in_config = any(stack in product.split() for product in bound.spec.config.values())
        stacks.append(description | {"sizes": recorded} | ({} if in_config else {"built_whole": True}))
    common_sizes = widest(sizes)
    layout = {"stacks": stacks, "build_with": bound.spec.build_with} | _outside_layers(bound, common_sizes)
    # Whether the config holds what a backbone needs to know: the widths of the stages that it returns.
    return {"dms_layers": layout | ({"backbone": True} if "Backbone" in bound.spec.heads else {})}


def _with_numbered(bound: BoundSpec, plan: Plan, sizes: list[dict[str, int]], config: Any) -> list[dict[str, int]]:
    """Sizes of the cut model's layers, with the values that follow from a layer's number in the dense model."""
    found = []
    for layer, (stack, number) in zip(sizes, kept_layers(plan, bound), strict=True):
        mine = bound.spec.by_number.items()
        inside = f"{bound.spec.stacks[stack]}.{{i}}."
        values = {key.removeprefix(inside): of(config, number) for key, of in mine if key.startswith(inside)}
        found.append(layer | values)
    return found


def layer_description(bound: BoundSpec) -> dict[str, Any]:
    """The description from which modeling_dms.py builds a layer of given sizes, for a model with one stack."""
    description = _inside_layers(bound, bound.depth)
    recorded = {product: key for key, product in bound.spec.config.items()}
    dims = {name: recorded.get(name, bound.spec.dim(name).size) for name in _dims_of(description)}
    # A function cannot be in config.json, so its value is.
    dims = {name: str(bound.sizes[name]) if callable(size) else size for name, size in dims.items()}
    for key in ("axes", "attributes"):  # the same lines for every layer, so the layer's number is left out
        description[key] = {name.removeprefix("{i}."): text for name, text in description[key].items()}
    return description | {"dims": dims, "build_with": bound.spec.build_with}


def _inside_layers(bound: BoundSpec, stack: str) -> dict[str, Any]:
    """The part of the description that is inside the layers of a stack.

    Args:
        bound: the architecture.
        stack: the depth dim of the layers.
    """
    spec, path = bound.spec, bound.spec.stacks[stack]
    inside = [name.removeprefix(bound.prefix) for name in (*bound.params, *bound.buffers)]
    axes = {
        pattern.removeprefix(f"{path}."): axes
        for pattern, axes in (spec.params | spec.buffers).items()
        if pattern.startswith(f"{path}.") and any(map(compiled(pattern).fullmatch, inside))
    }
    numbered = {pattern: pattern.removeprefix(f"{path}.{{i}}.") for pattern in spec.by_number}
    attributes = {
        pattern.removeprefix(f"{path}."): product
        for pattern, product in (spec.attributes | numbered).items()
        if pattern.startswith(f"{path}.")
    }
    return {"path": path, "axes": axes, "attributes": attributes}


def _outside_layers(bound: BoundSpec, sizes: dict[str, int]) -> dict[str, Any]:
    """The description of those tensors outside the layers that modeling_dms.py must resize; usually empty.

    The stock class builds such tensors itself, unless they have a dim whose size its config does not hold, or does not
    show it (`build_with`).

    Args:
        bound: the architecture.
        sizes: units of every dim in the cut model.
    """
    spec = bound.spec
    hidden = {factor for key in spec.build_with if key in spec.config for factor in spec.config[key].split()}
    # A stock class that derives its widths builds streams at their dense width, so their tensors outside the layers
    # (stem, head) need resizing too.
    hidden |= {dim.name for dim in spec.dims if dim.scope == "model"} if spec.per_layer_only else set()

    def unknown(lines: dict[str, str]) -> dict[str, str]:
        outside = {name: text for name, text in lines.items() if not name.startswith(paths)}
        return {name: text for name, text in outside.items() if hidden & {*flat(parse_axes(text))}}

    paths = tuple(f"{path}." for path in spec.stacks.values())
    lines = {
        "axes": unknown(spec.params | spec.buffers),
        "head": unknown({name: text for head in spec.heads.values() for name, text in head.items()}),
        "attributes": unknown(spec.attributes),
    }
    axes = [axis for texts in lines.values() for text in texts.values() for axis in parse_axes(text)]
    used = sorted({*flat(tuple(axis for axis in axes if hidden & {*axis}))})  # other axes stay as they are built
    return {"outside": lines | {"sizes": {name: sizes[name] for name in used}}} if used else {}


def _of_one_layer(description: dict[str, Any], place: int) -> dict[str, Any]:
    """The part of a stack's description that holds for one of its layers."""
    return {key: modeling_dms.lines_of_layer(description[key], place) for key in ("axes", "attributes")}


def _dims_of(description: dict[str, Any]) -> list[str]:
    """Names of the dims in a layer's description."""
    axes = [factor for text in description["axes"].values() for factor in flat(parse_axes(text))]
    products = [factor for text in description["attributes"].values() for factor in text.partition("**")[0].split()]
    return list(dict.fromkeys(axes + products))


def _alternative_class_and_config(cls: Any, stock: Any, bound: BoundSpec, values: dict[str, Any]) -> tuple[Any, Any]:
    """The class and config of the same model in another stock class that has fewer limits (Mistral for Llama)."""
    config_class = transformers.CONFIG_MAPPING[str(bound.spec.alternative)]
    old, new = (config.__name__.removesuffix("Config") for config in (stock, config_class))
    # The other config lacks them: `pretraining_tp` is Llama's own, and `alternative_needs` are all false.
    drop = {"model_type", "pretraining_tp", *bound.spec.alternative_needs}
    values = {key: value for key, value in values.items() if key not in drop} | bound.spec.alternative_overrides
    return getattr(transformers, cls.__name__.replace(old, new)), config_class.from_dict(values)
