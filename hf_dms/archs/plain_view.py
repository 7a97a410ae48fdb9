"""A model as it was before PEFT and bitsandbytes: names, shapes and weights of its parameters, seen through both.

An adapted linear map computes W'x with a W' that its adapters have a part in, so a mask on x before the adapters is a
mask on the columns of W'. Gates therefore go around adapters, never inside, and what is cut is W', made one parameter
at a time. Packed weights are unpacked the same way. Neither package is imported here before a model comes from it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HfDmsError
from .restoring import restoring

PACKED = ("Params4bit", "Int8Params")  # of bitsandbytes


def base_model_of(model: Any) -> Any:
    """The transformers model inside a `PeftModel`; anything else as it is."""
    return model.get_base_model() if _is(model, "PeftModel") else model


def plain_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Every parameter of a model under the name and with the shape that it has without adapters and packing.

    Tied ones come under each of their names; gates are left out.

    Args:
        module: the model, or a part of it.
        prefix: of the names.
    """
    module = plain_module(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, _shape(module, name, parameter)
    for name, child in module._modules.items():
        if child is not None and prefix + name != "dms_gates":
            yield from plain_parameters(child, f"{prefix}{name}.")


def plain_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every buffer of a model's state dict under the name that it has without adapters; gates are left out.

    Args:
        module: the model, or a part of it.
        prefix: of the names.
    """
    module = plain_module(module)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None and prefix + name != "dms_gates":
            yield from plain_buffers(child, f"{prefix}{name}.")


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its name in the plain model, as it lies in it."""
    path, _, leaf = name.rpartition(".")
    module = plain_module(submodule(model, path))
    return module._buffers[leaf] if leaf in module._buffers else module.get_parameter(leaf)  # type: ignore[return-value]


def names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter of a plain model, several for tied ones, by the `id` of its tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter, _ in plain_parameters(model):
        names.setdefault(id(parameter), []).append(name)
    return names


def plain_module(module: nn.Module) -> nn.Module:
    """The module below adapters, or the copy that PEFT trains in its place; any other module as it is."""
    if _is(module, "ModulesToSaveWrapper"):
        wrapper: Any = module
        active = wrapper.active_adapters[:1] if not wrapper.disable_adapters else []
        return wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    return module.get_base_layer() if _is(module, "BaseTunerLayer") else module  # type: ignore[operator]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and layers of PEFT that stand in the place of a model's own."""
    return ((path, module) for path, module in model.named_modules() if _is(module, "BaseTunerLayer"))


def submodule(model: nn.Module, path: str) -> nn.Module:
    """`get_submodule` by a path of the plain model: what is called in that place, with its adapters if it has any."""
    module = model
    for name in path.split(".") if path else ():
        module = plain_module(module).get_submodule(name)
    return plain_module(module) if _is(module, "ModulesToSaveWrapper") else module


@torch.no_grad()
def plain_weight(model: nn.Module, name: str) -> Tensor:
    """A parameter with the part that active adapters have in it, unpacked; or a buffer.

    Args:
        model: with or without adapters; it is left as it is.
        name: that of the tensor in the plain model.
    """
    path, _, leaf = name.rpartition(".")
    layer: Any = submodule(model, path)
    module = plain_module(layer)
    adapted = layer is not module and not layer.merged and not layer.disable_adapters
    if leaf == "weight" and is_packed(module):
        weight = unpacked(module)
        for adapter in layer.active_adapters if adapted else ():
            if adapter in layer._get_available_adapters():
                weight = weight + layer.get_delta_weight(adapter)
        return weight
    if adapted:
        gates = model._modules.get("dms_gates")
        merged = copy.deepcopy(layer, {id(gates): gates})  # its hooks know the gates
        merged.merge()
        module = merged.get_base_layer()
    return tensor_of(module, leaf).detach()


def with_adapters(model: Any, config: Any, seed: int) -> Any:
    """A `PeftModel` around a model, whose own weights are frozen.

    Args:
        model: a transformers model.
        config: `peft.LoraConfig`.
        seed: of the adapters' first weights.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, config)


def with_adapters_of(adapted: Any, model: Any) -> Any:
    """A `PeftModel` around a model, with the adapters and their weights of another.

    Args:
        adapted: a `PeftModel`.
        model: a model like the one inside it, without adapters.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    copied = get_peft_model(model, copy.deepcopy(adapted.active_peft_config))
    set_peft_model_state_dict(copied, get_peft_model_state_dict(adapted))
    return copied


# ---- packed weights --------------------------------------------------------------------------------------------------
def is_packed(module: nn.Module) -> bool:
    """Whether a module's weight is packed by bitsandbytes, in 8 or 4 bits."""
    return type(module._parameters.get("weight")).__name__ in PACKED


def unpacked(module: Any) -> Tensor:
    """The packed weight of a linear map, `[out, in]`."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # evaluation on a CPU with AVX-512 leaves 4-bit weights in another order; this restores it
    return dequantize_bnb_weight(module.weight, getattr(module, "state", None))


@contextlib.contextmanager
def packed_weights_may_stay(model: Any) -> Iterator[None]:
    """Let a Trainer be made of a packed model without adapters for a while: it takes for granted that weights train.

    Args:
        model: one whose weights are frozen, packed or not; None to leave everything as it is.
    """
    packed = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if packed:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if packed:
            model._hf_peft_config_loaded = False


@contextlib.contextmanager
def exact_packed_maps(model: nn.Module) -> Iterator[None]:
    """Let packed linear maps multiply by their unpacked weights for a while.

    8-bit maps round their inputs too, which the cut model, whose weights are not packed, does not.
    """
    packed: list[Any] = [module for module in model.modules() if is_packed(module)]
    with restoring(packed):
        for module in packed:
            module.forward = functools.partial(_multiply_by_unpacked, module)
        yield


def _multiply_by_unpacked(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, unpacked(module).to(x.dtype), None if module.bias is None else module.bias.to(x.dtype))


def _shape(module: Any, name: str, parameter: Tensor) -> tuple[int, ...]:
    return (
        (module.out_features, module.in_features) if name == "weight" and is_packed(module) else tuple(parameter.shape)
    )


# ---- what cannot be served -------------------------------------------------------------------------------------------
def check_adapters(model: nn.Module) -> None:
    """Check that a model's adapters become part of plain weights when they are merged.

    Raises:
        ValueError: one of them does not.
    """
    if _is(model, "PeftModel") and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        kind = model.active_peft_config.peft_type.value  # type: ignore[union-attr]
        raise HfDmsError(f"{kind} learns a prompt, which is no part of any weight. Use LoRA, or none.")
    owners = names_by_tensor(base_model_of(model))
    for path, module in model.named_modules():
        if _is(module, "AuxiliaryTrainingWrapper") and not _is(module, "ModulesToSaveWrapper"):
            raise HfDmsError(
                f"'{path}' is a {type(module).__name__} of PEFT, which the cut cannot follow. Leave it out."
            )
    for path, layer in adapted_layers(model):
        _check_layer(path, layer, owners)


def _check_layer(path: str, layer: Any, owners: dict[int, list[str]]) -> None:
    base, kind = layer.get_base_layer(), f"{type(layer).__module__}.{type(layer).__name__}".removeprefix("peft.tuners.")
    if not isinstance(base, (nn.Linear, nn.Conv2d, nn.Embedding)):
        raise HfDmsError(
            f"'{path}' is a {kind} on a {type(base).__name__}. Adapters of linear maps, convolutions and embeddings "
            "can be cut, no others: leave this module out of target_modules."
        )
    if is_packed(base) and (not _is(layer, "LoraLayer") or any(layer.use_dora.values())):
        raise HfDmsError(f"'{path}' is a {kind} on packed weights, which takes plain LoRA (use_dora=False).")
    if len(names := owners[id(base.weight)]) > 1:
        raise HfDmsError(
            f"'{path}' is adapted, and its weight is tied: {' and '.join(names)} are one tensor, and merging would "
            "change both. Leave it out of target_modules."
        )


def _is(module: object, name: str) -> bool:
    """Whether a module is an instance of PEFT's class of this name."""
    return any(cls.__name__ == name and cls.__module__.startswith("peft.") for cls in type(module).__mro__)
