"""Models whose layers differ in width: the file that travels with a per-layer checkpoint of hf_dms.

It needs torch and transformers only. `Dms<Stock class>` (DmsLlamaForCausalLM, ...) is the stock class with its layers
resized. config.json has each layer's sizes in transformers' own `per_layer_config`. Its `dms_layers` says, for each
axis of a layer's parameters, which of these sizes it is the product of. With hf_dms installed, `import hf_dms`
registers these classes; without it, `from_pretrained(..., trust_remote_code=True)` finds this file.
"""

import contextlib
import functools
import re
import warnings
from math import prod
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import conversion_mapping

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForObjectDetection",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoBackbone",
)


# Cached, because the Auto classes find a config's models by its class: a second class would be unknown to them.
@functools.cache
def dms_config_class(stock: Any) -> Any:
    """The config class of per-layer models of a stock architecture.

    Args:
        stock: its stock config class, e.g. `LlamaConfig`.
    """

    def validate_architecture(self) -> None:
        """Skip the stock check: it reads sizes that differ per layer here. Building the layers checks them."""

    def __post_init__(self, **kwargs) -> None:
        # With the first config, not on import: the modules of all model classes take seconds to import.
        register_models(stock)
        super(cls, self).__post_init__(**kwargs)

    def same(self, other) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    name = f"Dms{stock.__name__}"
    namespace = {
        "model_type": f"dms_{stock.model_type}",
        "__module__": __name__,
        "__doc__": f"Config of a `{stock.__name__}` model whose layers differ in width.",
        "__annotations__": {"dms_layers": "dict | None"},
        "dms_layers": None,
        "__post_init__": __post_init__,
        "validate_architecture": validate_architecture,
        "__hash__": None,
    }
    cls: Any = strict(type(name, (stock,), namespace))  # without `strict` the parent's validators would still run
    cls.__eq__ = same  # the generated method reads attributes that differ per layer, which transformers refuses
    return cls


@functools.cache
def register_models(stock: Any) -> None:
    """Register the per-layer model classes of a stock config class with the Auto classes."""
    for name in AUTO_CLASSES:
        if classes := tuple(dms_model_class(cls) for cls in stock_classes(name, stock)):
            mapping = getattr(transformers, name)._model_mapping
            mapping.register(dms_config_class(stock), classes if len(classes) > 1 else classes[0], exist_ok=True)


@functools.cache
def dms_model_class(stock: Any) -> Any:
    """The per-layer class of a stock model class, e.g. `LlamaForCausalLM`."""
    config_class = dms_config_class(stock.config_class)
    if renaming := conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__):
        # Checkpoints of some stock classes hold other parameter names than the model. transformers finds the renaming
        # by the name of the class, so the new class needs an entry of its own.
        conversion_mapping.register_checkpoint_conversion_mapping(f"Dms{stock.__name__}", renaming, overwrite=True)

    # With the stock signature, which transformers' own model tests read.
    @functools.wraps(stock.__init__)
    def __init__(self, config, *args, **kwargs) -> None:
        if stock.__name__.endswith("Backbone") and not config.dms_layers.get("backbone"):
            raise ValueError(
                f"This checkpoint of model type '{config.model_type}' cannot be loaded as a backbone: layers that a "
                "backbone's outputs are named after may be gone, or their widths are not in the config. Use AutoModel."
            )
        with _common_sizes(config), warnings.catch_warnings():
            # A stock ResNet's inner width is a quarter of its outer one, rounded down.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            stock.__init__(self, config, *args, **kwargs)
        resize_layers_(self)

    namespace = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with layers that differ in width.",
        "__annotations__": {"config": config_class},
        "config_class": config_class,
        # `save_pretrained` copies this file beside the weights of a class that has an auto class.
        "_auto_class": auto_class_of(stock),
    }
    return type(f"Dms{stock.__name__}", (stock,), namespace)


@contextlib.contextmanager
def _common_sizes(config):
    """Context: the config of a per-layer model looks like a stock config, so that the stock class can be built.

    It shows the common sizes. Where the stock class would refuse these, `build_with` names values that it accepts; the
    layers are resized right after.
    """
    # `to_dict` first: attributes that differ between layers cannot be read one by one.
    recorded, build_with = config.to_dict(), config.dms_layers["build_with"]
    config.per_layer_config = None
    for attribute, value in build_with.items():
        setattr(config, attribute, value)
    try:
        yield
    finally:
        for attribute in build_with:
            setattr(config, attribute, recorded[attribute])
        config.per_layer_config = recorded.get("per_layer_config")


def resize_layers_(model) -> None:
    """Give each layer of a freshly built stock model the sizes that its config records, in place."""
    layout = model.config.dms_layers
    if "stacks" not in layout:  # one stack of layers; its sizes are in transformers' own schema
        count = len(model.base_model.get_submodule(layout["path"]))
        layers = [model.config.per_layer_config[index] for index in range(count)]
        sizes = [{name: _size(expression, layer) for name, expression in layout["dims"].items()} for layer in layers]
        lines = {key: {f"{{i}}.{name}": text for name, text in layout[key].items()} for key in ("axes", "attributes")}
        resize_stack_(model, layout | lines, sizes)
    for stack in layout.get("stacks", ()):
        resize_stack_(model, stack, stack["sizes"])
    if outside := layout.get("outside"):
        for within, key in ((model.base_model, "axes"), (model, "head")):
            modules = dict(within.named_modules())
            axes = {name: text for name, text in outside[key].items() if name.rpartition(".")[0] in modules}
            attributes = outside["attributes"] if key == "axes" else {}
            resize_(model, within, axes, attributes, outside["sizes"])


def resize_stack_(model, layout: dict, layer_sizes: list[dict[str, int]]) -> None:
    """Give the layers of a stack their sizes, in place.

    Args:
        model: a freshly built stock model.
        layout: `path` of the stack below the base model; `axes` of a layer's parameters and buffers; `attributes` of
            modules that hold a size. Their names begin with `{i}` for any layer, `{i>0}` for any layer but the first,
            or a layer's number. `built_whole`: whether the stock class builds all layers of the dense model, because
            its config does not hold their number.
        layer_sizes: units of every dim, layer by layer.
    """
    stack = model.base_model.get_submodule(layout["path"])
    if layout.get("built_whole"):  # the config does not hold the number of layers
        del stack[len(layer_sizes) :]
    if len(layer_sizes) != len(stack):
        raise ValueError(
            f"config.json: dms_layers has the sizes of {len(layer_sizes)} layers of {layout['path']}, and the config "
            f"asks for {len(stack)}. The file was changed by hand or cut short: save the model again."
        )
    for index, (layer, sizes) in enumerate(zip(stack, layer_sizes)):
        attributes, axes = (lines_of_layer(layout[key], index) for key in ("attributes", "axes"))
        resize_(model, layer, axes, attributes, sizes)


def resize_(model, within, axes: dict[str, str], attributes: dict[str, str], sizes: dict[str, int]) -> None:
    """Give parameters and buffers their sizes, with fresh values, in place.

    Args:
        model: a freshly built stock model.
        within: the part of the model that the names below are relative to.
        axes: by name of a parameter or buffer, the dims that its axes are products of, or sums of products; an axis
            with a dim that `sizes` does not have stays as it is.
        attributes: by name of a module's attribute, the dims that its value is a product of.
        sizes: units of every dim.
    """
    for pattern, product in attributes.items():
        path, _, attribute = pattern.rpartition(".")
        factors, _, power = product.partition("**")
        value = prod(sizes[factor] for factor in factors.split())
        setattr(within.get_submodule(path), attribute, value ** float(power) if power else value)
    resized: dict[nn.Module, None] = {}  # an ordered set: the same seed must give the same weights
    for name, product in axes.items():
        path, _, leaf = name.rpartition(".")
        module = within.get_submodule(path)
        old = getattr(module, leaf)
        if old is None:  # a map without bias
            continue
        shape = tuple(
            sum(prod(sizes[factor] for factor in term) for term in axis)
            if all(sizes.keys() >= {*term} for term in axis)
            else size
            for axis, size in zip(_parse(product), old.shape, strict=True)
        )
        # Only what changes is made anew: the rest keeps the values that the stock class drew.
        if tuple(old.shape) != shape:
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = shape
            if isinstance(module, nn.Conv2d) and leaf == "weight":
                module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = shape
            if isinstance(module, nn.BatchNorm2d):
                (module.num_features,) = shape  # a detector builds frozen norms by it
            resized[module] = None
    # Once each, and only now: a module's weight and bias both have their shapes.
    for module in resized:
        model._init_weights(module)


def lines_of_layer(lines: dict[str, str], index: int) -> dict[str, str]:
    """The lines of a description that hold for a layer, by names inside the layer."""
    mine = {"{i}", str(index)} | ({"{i>0}"} if index > 0 else set())
    return {name.partition(".")[2]: text for name, text in lines.items() if name.partition(".")[0] in mine}


def _parse(axes: str) -> list[list[list[str]]]:
    """For each axis, the products of dims that follow each other on it: `"out (a + b)"` → `[[[out]], [[a], [b]]]`."""
    axes = axes.partition("@")[0]  # the part after @ says how often a map runs, which only costs depend on
    found = re.findall(r"\([^)]*\)|\S+", axes)
    return [[term.split() for term in axis.strip("()").split("+")] for axis in found]


def _size(expression: str, config) -> int:
    if expression.isdigit():
        return int(expression)
    values = [getattr(config, name.strip()) for name in expression.split("//")]
    return values[0] if len(values) == 1 else values[0] // values[1]


def stock_classes(auto: str, stock_config: Any) -> tuple[Any, ...]:
    """The classes of an Auto class for a stock config class, usually one or none."""
    found = getattr(transformers, auto)._model_mapping.get(stock_config, ())
    return found if isinstance(found, tuple) else (found,)


def _is_of_transformers(stock: Any) -> bool:
    return getattr(transformers, stock.__name__, None) is stock


def auto_class_of(stock: Any) -> str | None:
    """The Auto class under which this file travels with a checkpoint."""
    if not _is_of_transformers(stock):
        return None
    return next((name for name in AUTO_CLASSES if stock in stock_classes(name, stock.config_class)), "AutoModel")


def auto_map(stock_config: Any) -> dict[str, str]:
    """`auto_map` of a per-layer config: for every head of the architecture, the class in this file.

    It is empty for an architecture outside transformers: this file could not build its classes without that code.
    """
    if not _is_of_transformers(stock_config):
        return {}
    file = __name__.rpartition(".")[2]
    classes = {"AutoConfig": f"{file}.Dms{stock_config.__name__}"}
    for name in AUTO_CLASSES:
        for cls in stock_classes(name, stock_config)[:1]:  # saving a model puts its own class there
            classes[name] = f"{file}.Dms{cls.__name__}"
    return classes


def __getattr__(name: str) -> Any:
    """`DmsLlamaConfig`, `DmsLlamaForCausalLM`, ...: made from the stock class of that name when first asked for."""
    stock: Any = getattr(transformers, name.removeprefix("Dms"), None) if name.startswith("Dms") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_config = issubclass(stock, transformers.PreTrainedConfig)
    return (dms_config_class if is_config else dms_model_class)(stock)
