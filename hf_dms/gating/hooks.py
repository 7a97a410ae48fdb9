"""The hooks and replaced `forward` methods by which a model reads masked units.

attach.py says what is masked where, and why. Here is how: what each kind of module does with the masks of the gates.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.plain_view import submodule
from ..gates import Gates
from ..masked_ops import GateResidual, MaskedNorm, MaskKernel, MaskUnits, Span, mask_of, masked_response_norm, spread
from .checks import check_checkpointing
from .places import (
    masked_batch_norms,
    masked_inputs,
    norm_axis,
    norm_spans,
    norms,
    response_norms,
    scaled_norms,
    unit_axis,
    unnormed,
)

# A map's weights are masked instead of its inputs if they are at least this many times fewer numbers. Masked weights
# are one more tensor that is saved for the backward, masked inputs are not, so a small advantage would not pay.
FEWER = 4

Part = tuple[str, int, Span]  # a dim on the axis of a module: its name, the row of its gates, where it is
Parts = collections.defaultdict[str, list[Part]]  # by the path of a module


def hooks_for_masks(model: PreTrainedModel, gates: Gates, bound: BoundSpec) -> list[RemovableHandle]:
    """Make a model read masked units: by replaced `forward` methods, and by hooks.

    Returns:
        The hooks; `detach_` finds the replaced methods by `MASKED_FORWARDS`.
    """
    hooks: list[RemovableHandle] = []
    for name in gates.dims:
        for layer, module in enumerate(submodule(model, bound.stacks[name]).children() if name in bound.stacks else ()):
            if layer in bound.fixed_layers[name]:
                continue  # it may change width or resolution, so its input cannot stand in for its output
            hook = functools.partial(_gate_residual, gates, name, layer)
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        at_outputs = functools.partial(_mask_output, gates, name)
        hooks += [submodule(model, path).register_forward_hook(at_outputs) for path in unnormed(bound, name)]
        for path, row in response_norms(bound, name):
            norm = submodule(model, path)
            norm.forward = functools.partial(_masked_response_norm_forward, norm, gates, name, row)
    over_units, batch_norms, maps = _masked_modules(gates, bound)
    for path, parts in over_units.items():
        # A hook would see the norm's output only, and its statistics must leave units out.
        norm = submodule(model, path)
        norm.forward = functools.partial(_masked_norm_forward, norm, gates, parts, norm_axis(bound, path))
    for path, parts in batch_norms.items():
        norm = submodule(model, path)
        norm.forward = functools.partial(_masked_batch_norm_forward, norm, gates, parts)
    for path, parts in maps.items():
        hooks += _mask_reader(submodule(model, path), gates, parts, unit_axis(bound, path))
    return hooks


def _masked_modules(gates: Gates, bound: BoundSpec) -> tuple[Parts, Parts, Parts]:
    """Norms over units, batch norms, and maps that read masked units: by path, all dims on the module's axis.

    These may be several: the factors of a product, or dims one after the other.
    """
    over_units, batch_norms, maps = Parts(list), Parts(list), Parts(list)
    for name in gates.dims:
        # A dim with norms is a residual stream: masking its norms masks every read. Each dim has one of the three: in
        # two of them its mask would count twice.
        if paths := list(norms(bound, name)):
            for path in paths:
                over_units[path] += [(name, 0, span) for span in norm_spans(bound, path, name)]
        elif places := list(masked_batch_norms(bound, name)):
            for path, row, span in places:
                batch_norms[path].append((name, row, span))
        else:
            for path, row, span in masked_inputs(bound, name):
                maps[path].append((name, row, span))
    return over_units, batch_norms, maps


def hooks_for_scales(model: PreTrainedModel, gates: Gates, bound: BoundSpec) -> list[RemovableHandle]:
    """Multiply the outputs of norms by their scales, where they have scales, by the hooks that are returned."""
    return [
        submodule(model, path).register_forward_hook(
            functools.partial(_scale_norm, gates, name, row, span, norm_axis(bound, path))
        )
        for name, paths in scaled_norms(bound).items()
        if name in gates.scales
        for row, path in enumerate(paths)
        for span in norm_spans(bound, path, name)
    ]


def _mask_reader(module: Any, gates: Gates, parts: list[Part], axis: int) -> list[RemovableHandle]:
    """Make a linear map or a convolution read masked units: by a replaced `forward`, or by the hook that is returned.

    Only plain maps get a replaced `forward`. Others (PEFT's, bitsandbytes', grouped convolutions) do more than their
    weights say, so their input is masked.
    """
    # `type(...) is`, not isinstance: a subclass may do more in its own forward. The weight of a grouped convolution has
    # only the inputs of one group on its axis.
    is_plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    if is_plain:
        module.forward = functools.partial(masked_map_forward, module, gates, parts, axis)
        return []
    return [module.register_forward_pre_hook(functools.partial(mask_input, gates, parts, axis))]


# ---- what the hooks do -----------------------------------------------------------------------------------------------
def compute_masks(gates: Gates, module: nn.Module, args: tuple) -> None:
    if gates.training:
        check_checkpointing(module)  # it may have been switched on since
    gates.compute_masks_()


def _masks_on(gates: Gates, parts: list[Part]) -> tuple[Tensor, Span] | None:
    """log m of an axis and where it holds; None if a refitted map leaves units out itself (refit/search.py)."""
    found = [(gates.log_masks[name][row], span) for name, row, span in parts]
    if any(log_mask is None for log_mask, _ in found):
        return None
    if len(found) == 1:
        return found[0]
    # A mask of 1, log m = 0, where another dim is: the sum is one mask for the whole axis.
    over_axis = torch.stack([spread(log_mask, span, other=0.0) for log_mask, span in found]).sum(0)
    return over_axis, Span(1, len(over_axis), 1)


def mask_input(gates: Gates, parts: list[Part], axis: int, module: nn.Module, args: tuple):
    if (masks := _masks_on(gates, parts)) is None:
        return None
    return (MaskUnits.apply(args[0], *masks, axis), *args[1:])


def _mask_output(gates: Gates, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return MaskUnits.apply(output, gates.log_masks[name][0], Span(1, gates.dims[name].units, 1))


def _scale_norm(
    gates: Gates, name: str, row: int, span: Span, axis: int, module: nn.Module, args: tuple, output: Tensor
):
    if (log_scales := gates.log_masks.get(name)) is None:  # the model runs without scales, see `open_gates`
        return None
    return MaskUnits.apply(output, log_scales[row], span, axis)


def _gate_residual(gates: Gates, name: str, layer: int, module: nn.Module, args: tuple, kwargs: dict, output):
    # transformers' models call their layers with or without a keyword.
    before = args[0] if args else kwargs["hidden_states"]
    # The dim of a stack has one row, and its units are the layers.
    log_mask = gates.log_masks[name][0][layer]
    # Some layers also return attention weights, which a depth mask leaves alone.
    if isinstance(output, tuple):
        return (GateResidual.apply(before, output[0], log_mask), *output[1:])
    return GateResidual.apply(before, output, log_mask)


def _masked_norm_forward(norm: nn.Module, gates: Gates, parts: list[Part], axis: int, x: Tensor) -> Tensor:
    if (masks := _masks_on(gates, parts)) is None:
        return type(norm).forward(norm, x)
    centered = isinstance(norm, nn.LayerNorm)
    # The stock RMS norms of transformers name it differently from torch's layer norm.
    eps = norm.eps if centered else norm.variance_epsilon
    bias = norm.bias if centered else None
    # Every unit's mask at each of its positions; the backward adds their gradients up.
    over_axis = spread(*masks, other=0.0)
    x = x.movedim(axis, -1)
    return MaskedNorm.apply(x, over_axis, norm.weight, bias, eps, centered).movedim(-1, axis)


def masked_map_forward(module: Any, gates: Gates, parts: list[Part], axis: int, x: Tensor) -> Tensor:
    # The forward of the class: `module.forward` is this function.
    if (masks := _masks_on(gates, parts)) is None:
        return type(module).forward(module, x)
    # With frozen weights the map saves no input for the backward, so masked inputs are the only tensor that is saved.
    if not module.weight.requires_grad or FEWER * module.weight.numel() > x.numel():
        return type(module).forward(module, MaskUnits.apply(x, *masks, axis))
    weight = MaskKernel.apply(module.weight, *masks)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    # `F.conv2d` would leave out a padding mode other than zeros.
    return module._conv_forward(x, weight, module.bias)


def _masked_batch_norm_forward(norm: nn.Module, gates: Gates, parts: list[Part], x: Tensor) -> Tensor:
    if (masks := _masks_on(gates, parts)) is None:
        return type(norm).forward(norm, x)
    # In `_parameters` because torch's module refuses a plain tensor as attribute where a Parameter is registered.
    own: dict[str, Any] = norm._parameters
    before = dict(own)
    mask = mask_of(spread(*masks, other=0.0))
    try:  # run the stock forward with masked parameters: it handles statistics, momentum and frozen variants
        # Weight and bias alike: m·(w·x̂ + b).
        own.update({key: parameter * mask.to(parameter.dtype) for key, parameter in before.items()})
        return type(norm).forward(norm, x)
    finally:
        own.update(before)


def _masked_response_norm_forward(norm: Any, gates: Gates, name: str, row: int, x: Tensor) -> Tensor:
    if (log_mask := gates.log_masks[name][row]) is None:
        return type(norm).forward(norm, x)
    return masked_response_norm(x, log_mask, norm.weight, norm.bias)


MASKED_FORWARDS = (
    _masked_norm_forward,
    masked_map_forward,
    _masked_response_norm_forward,
    _masked_batch_norm_forward,
)  # the methods that `attach_` puts in place of `forward`; `detach_` finds them by this list
