"""The plain view of a model with PEFT adapters or bitsandbytes weights: names, shapes and weights as without them.

An adapted linear map computes W'x, where W' includes its adapters. A mask on x, applied before the adapters, is a mask
on the columns of W'. So gates go around adapters, never inside, and the cut slices W', which is computed one parameter
at a time. Packed weights are unpacked in the same way. PEFT and bitsandbytes are only imported if a model uses them.
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

PACKED = ("Params4bit", "Int8Params")  # parameter classes of bitsandbytes


def base_model_of(model: Any) -> Any:
    """The transformers model inside a `PeftModel`. Any other object is returned unchanged."""
    return model.get_base_model() if _is(model, "PeftModel") else model


def plain_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Every parameter of a model, with its name and shape as without adapters and packing.

    Tied parameters appear under each of their names. Gates are left out.

    Args:
        module: the model, or a part of it.
        prefix: prefix of the names.
    """
    for path, plain in _plain_modules(module, prefix):
        for name, parameter in plain._parameters.items():
            if parameter is not None:
                yield path + name, parameter, _shape(plain, name, parameter)


def plain_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every buffer of a model's state dict, with its name as without adapters. Gates are left out.

    Args:
        module: the model, or a part of it.
        prefix: prefix of the names.
    """
    for path, plain in _plain_modules(module, prefix):
        for name, buffer in plain._buffers.items():
            if buffer is not None and name not in plain._non_persistent_buffers_set:
                yield path + name, buffer


def _plain_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a plain model, parents first, with the prefix of its tensors' names. Gates are left out."""
    # A stack in place of recursion: nested generators would hand each name up through all levels of the model.
    waiting = [(prefix, module)]
    while waiting:
        path, each = waiting.pop()
        plain = plain_module(each)
        yield path, plain
        children = [(f"{path}{name}.", child) for name, child in plain._modules.items() if child is not None]
        waiting += [child for child in reversed(children) if child[0] != "dms_gates."]


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its name in the plain model: the stored tensor itself, without adapters."""
    path, _, leaf = name.rpartition(".")
    module = plain_module(submodule(model, path))
    return module._buffers[leaf] if leaf in module._buffers else module.get_parameter(leaf)  # type: ignore[return-value]


def names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter of a plain model, by the `id` of its tensor; several names for a tied one."""
    names: dict[int, list[str]] = {}
    for name, parameter, _ in plain_parameters(model):
        names.setdefault(id(parameter), []).append(name)
    return names


def plain_module(module: nn.Module) -> nn.Module:
    """The original module under a PEFT wrapper (or its trained copy, for `modules_to_save`).

    Other modules are returned unchanged.
    """
    if _is(module, "ModulesToSaveWrapper"):
        wrapper: Any = module
        active = wrapper.active_adapters[:1] if not wrapper.disable_adapters else []  # PEFT runs the first, if several
        return wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    return module.get_base_layer() if _is(module, "BaseTunerLayer") else module  # type: ignore[operator]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules of the PEFT layers that replace layers of a model."""
    return ((path, module) for path, module in model.named_modules() if _is(module, "BaseTunerLayer"))


def submodule(model: nn.Module, path: str) -> nn.Module:
    """`get_submodule` by a path of the plain model. The result includes adapters, if there are any."""
    module = model
    for name in path.split(".") if path else ():
        module = plain_module(module).get_submodule(name)
    return plain_module(module) if _is(module, "ModulesToSaveWrapper") else module


@torch.no_grad()
def plain_weight(model: nn.Module, name: str) -> Tensor:
    """A parameter, unpacked and with active adapters merged; or a buffer.

    Args:
        model: a model with or without adapters; it is not modified.
        name: name of the tensor in the plain model.
    """
    path, _, leaf = name.rpartition(".")
    layer: Any = submodule(model, path)
    module = plain_module(layer)
    adapted = layer is not module and not layer.merged and not layer.disable_adapters
    if leaf == "weight" and is_packed(module):
        # Not by `merge`, which packs the sum again and so rounds it.
        weight = unpacked(module)
        for adapter in layer.active_adapters if adapted else ():
            # An adapter that is active in the model need not adapt this layer.
            if adapter in layer._get_available_adapters():
                weight = weight + layer.get_delta_weight(adapter)
        return weight
    if adapted:
        gates = model._modules.get("dms_gates")
        merged = copy.deepcopy(layer, {id(gates): gates})  # its hooks refer to the gates, which need no copy
        merged.merge()
        module = merged.get_base_layer()
    return tensor_of(module, leaf).detach()


def with_adapters(model: Any, config: Any, seed: int) -> Any:
    """A `PeftModel` around a model; the model's own weights are frozen.

    Args:
        model: a transformers model.
        config: `peft.LoraConfig`.
        seed: seed of the adapters' initial weights.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)  # PEFT draws from torch's own generator and takes no other
    return get_peft_model(model, config)


def with_adapters_of(adapted: Any, model: Any) -> Any:
    """A `PeftModel` around a model, with copies of another model's adapters.

    Args:
        adapted: the `PeftModel` with the adapters.
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
        module.state_dict()  # on a CPU with AVX-512, evaluation reorders 4-bit weights; this restores the order
    return dequantize_bnb_weight(module.weight, getattr(module, "state", None))


@contextlib.contextmanager
def packed_weights_may_stay(model: Any) -> Iterator[None]:
    """Context: a Trainer can be created for a packed model without adapters. Trainer assumes that weights train.

    Args:
        model: a model with frozen weights, packed or not; None changes nothing.
    """
    # By this attribute Trainer recognises that a packed model has adapters to train. It refuses a packed model without.
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
    """Context: packed linear maps multiply by their unpacked weights.

    8-bit maps also round their inputs. The cut model has no packed weights and does not, so outputs would differ.
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


# ---- adapters that are not supported ---------------------------------------------------------------------------------
def check_adapters(model: nn.Module) -> None:
    """Check that all adapters of a model can be merged into plain weights.

    Raises:
        ValueError: an adapter cannot.
    """
    if _is(model, "PeftModel") and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        kind = model.active_peft_config.peft_type.value  # type: ignore[union-attr]
        raise HfDmsError(f"{kind} learns a prompt, which cannot be merged into weights. Use LoRA, or no adapters.")
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
    cls: Any = type(module)
    return _is_subclass(cls, name)


@functools.cache  # asked for every module of a model, and a model has few classes
def _is_subclass(cls: Any, name: str) -> bool:
    return any(each.__name__ == name and each.__module__.startswith("peft.") for each in cls.__mro__)
