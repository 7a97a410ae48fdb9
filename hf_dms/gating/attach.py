"""Where a gate touches the running model: `attach_` and `detach_`.

- Hidden size, or the width of a stage: every norm takes its statistics over the kept width, and its output is masked.
  Every read of the residual stream passes a norm, so nothing else has to change. Where the stream is read without a
  norm, the description lists the module that writes it (`unnormed`), and its output is masked.
- Other widths: the input of every linear map or convolution that reads the dim is multiplied by the mask. Two cheaper
  forms of the same multiplication, with the same gradient, are used where they hold fewer numbers: the mask goes into
  the weights of the map if these train, or into the weight and bias of a batch norm. (Between that norm and the map is
  only a ReLU, and a mask, never negative, passes a ReLU unchanged.) Several dims on one axis, as in (a + b), make one
  mask.
- Depth: x + m·(layer(x) - x), the paper's x + m·f(x) for a residual block.

A hard-masked model computes what the cut model computes. No module is wrapped or renamed, so checkpoints, PEFT and a
Trainer see the model they know. Each multiplication saves only its output for the backward (masked_ops.py).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..archs.axes import Axis, terms
from ..archs.bind import BoundParam, BoundSpec, bind, compiled
from ..archs.plain_view import adapted_layers, base_model_of, check_adapters, submodule, tensor_of
from ..archs.registry import spec_for
from ..config import DMSConfig
from ..errors import HfDmsError
from ..files import keep_source_, keeps_source
from ..gates import Gates
from ..masked_ops import GateResidual, MaskedNorm, MaskKernel, MaskUnits, Span, mask_of, masked_response_norm, spread
from .checks import check_as_built, check_attachable, check_checkpointing, check_model
from .gates_for import build_gates, for_stages
from .rounding import check_target, rounded_of
from .share import with_share

NORMS = "norms."  # prefix of the names of norms' scales: `norms.hidden` are those of the norms over `hidden`

# A map's weights are masked instead of its inputs if they are at least this many times fewer numbers. Masked weights
# are one more tensor that is saved for the backward, masked inputs are not, so a small advantage would not pay.
FEWER = 4

Part = tuple[str, int, Span]  # a dim on the axis of a module: its name, the row of its gates, where it is
Parts = collections.defaultdict[str, list[Part]]  # by the path of a module


@dataclass(frozen=True)
class Attachment:
    """Everything that `attach_` set up on a model and `detach_` undoes, with the request it was set up for."""

    bound: BoundSpec
    config: DMSConfig
    model_config: Any
    hooks: list[RemovableHandle]
    frozen: list[str] = field(default_factory=list)  # names of the parameters that `freeze_` froze
    statistics: dict[str, Tensor] = field(default_factory=dict)  # of batch norms, at the time of `freeze_`
    keeps_source: bool = False  # whether `attach_` made `save_pretrained` refuse the dense model's folder


def attach_(model: PreTrainedModel, dms_config: DMSConfig) -> None:
    """Put gates on a model, in place; they are `model.dms_gates`.

    The model then runs on soft masks in training mode and on hard masks in evaluation mode. Its parameters keep their
    names, and its state dict keeps its keys. `save_pretrained` refuses the folder that the model was loaded from.

    In your own training loop, call `model.train()` first. After each backward pass of
    `loss + model.dms_gates.resource_loss(progress)`, call `model.dms_gates.update_importance_()` and then the
    optimizer's step.

    Args:
        model: a dense model of a supported architecture, or a `PeftModel` of one; adapters must be on it already.
        dms_config: what to prune and how far.

    Raises:
        ValueError: hf_dms does not support the model or the request; the message says why. The model is not changed.
    """
    check_model(base_model_of(model), "attach_")
    check_adapters(model)
    model = base_model_of(model)
    if has_gates(model):
        raise HfDmsError("This model has gates already. Take them off with hf_dms.detach_(model) first.")
    if any(map(_reads_masks, model.modules())):
        raise HfDmsError(
            "Modules of this model belong to a model that has gates already: one around it, inside it, or with the "
            "same base. Take them off that model with hf_dms.detach_ first."
        )
    # The cheap checks come first: a sharded or unloaded model would make the later ones fail with stranger messages.
    check_attachable(model)
    spec = spec_for(model.config)
    # `spec_for` has refused unknown types by now, so the skeleton that this builds is of a known class.
    check_as_built(model)
    bound = bind(spec, model)
    dms_config = with_share(for_stages(dms_config, bound.spec), bound, model)
    gates = build_gates(bound, model, dms_config)
    # Last check; nothing above has touched the model, as the docstring promises.
    check_target(gates, bound, dms_config, model.config)
    if dms_config.scales:
        gates.scales = _scales(gates, bound, dms_config)
    # A new module is in training mode, a model from `from_pretrained` in evaluation mode.
    gates.train(model.training)
    # A submodule, so that optimizers find the ratios in `model.parameters()`, and `train()` and `to()` reach the gates.
    model.add_module("dms_gates", gates)
    # All masks are computed before the first layer runs, in one batch per dim: 30 layers would otherwise sort 30 times.
    # With checkpointing, layers run again in the backward pass and read the same masks.
    hooks = [model.register_forward_pre_hook(functools.partial(_compute_masks, gates))]
    hooks += [*_hooks_for_masks(model, gates, bound), *_hooks_for_scales(model, gates, bound)]
    keep = not keeps_source(model)  # a model that `prune` returned refuses already, and `detach_` must leave that
    gates.attachment = Attachment(bound, dms_config, model.config, hooks, keeps_source=keep)
    if keep:
        keep_source_(model, model.name_or_path)
    # Last: until there is an attachment, hard masks have no request to round by.
    gates.rounder = rounded_of


def _hooks_for_masks(model: PreTrainedModel, gates: Gates, bound: BoundSpec) -> list[RemovableHandle]:
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
        norm.forward = functools.partial(_masked_norm_forward, norm, gates, parts, _axis_of(bound, path))
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


def _hooks_for_scales(model: PreTrainedModel, gates: Gates, bound: BoundSpec) -> list[RemovableHandle]:
    """Multiply the outputs of norms by their scales, where they have scales, by the hooks that are returned."""
    return [
        submodule(model, path).register_forward_hook(
            functools.partial(_scale_norm, gates, name, row, span, _axis_of(bound, path))
        )
        for name, paths in scaled_norms(bound).items()
        if name in gates.scales
        for row, path in enumerate(paths)
        for span in norm_spans(bound, path, name)
    ]


def detach_(model: PreTrainedModel) -> None:
    """Take the gates off a model, in place, and undo everything that `attach_` and `freeze_` changed.

    Weights that `freeze_` froze require gradients again, and batch norms get back the statistics from before.

    Raises:
        ValueError: the model has no gates.
    """
    gates, model = gates_of(model), base_model_of(model)
    for hook in gates.attachment.hooks:
        hook.remove()
    for name, parameter in model.named_parameters():
        if name in gates.attachment.frozen:
            parameter.requires_grad_(True)
    for name, tensor in gates.attachment.statistics.items():
        tensor_of(model, name).copy_(tensor)
    for module in model.modules():
        # A `forward` that somebody else has put on a module stays.
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func in MASKED_FORWARDS:
            del module.forward
    if gates.attachment.keeps_source and keeps_source(model):
        del model.save_pretrained
    del model.dms_gates


def freeze_(model: nn.Module) -> None:
    """Freeze the weights of a model with gates until `detach_`, in place: only the prune ratios train."""
    gates, base = gates_of(model), base_model_of(model)
    for name, parameter in base.named_parameters():
        # Only what trained until now, so that `detach_` leaves weights that the user froze frozen.
        if parameter.requires_grad and parameter is not gates.prune_ratio:
            parameter.requires_grad_(False)
            gates.attachment.frozen.append(name)
    # Batch norms go on averaging over the masked model's activations while the weights are frozen, so the dense model's
    # statistics are kept to return to.
    statistics = {name: tensor_of(base, name).clone() for name in gates.attachment.bound.buffers}
    gates.attachment.statistics.update(statistics)


def frozen_mode_(model: nn.Module) -> None:
    """Put a model with frozen weights into evaluation mode, in place, except for its gates and batch norms.

    Dropout would add noise to the importance, and a frozen model gains nothing from it. Batch norms must see the batch
    statistics of the masked model. Layers with activation checkpointing keep their own training flag, because it
    switches the checkpointing on; the modules inside them do not. Call it after each `model.train()`.
    """
    gates, base = gates_of(model), base_model_of(model)
    for module in base.modules():
        # The model's own flag stays, because a Trainer tells a training step from an evaluation by it.
        if module not in (base, gates) and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = getattr(module, "gradient_checkpointing", False)


def check_gates_outside(model: nn.Module) -> None:
    """Check that the adapters of a model with gates were on it before the gates.

    Raises:
        ValueError: a mask lies inside an adapted layer. Its adapters read the unmasked input.
    """
    for path, layer in adapted_layers(model):
        # PEFT's wrapper calls the original module, which still has the mask; its adapters read the input before that.
        inside = layer.get_base_layer()
        for hook in (*inside._forward_pre_hooks.values(), inside.__dict__.get("forward")):
            if getattr(hook, "func", None) in (_mask_input, _masked_map_forward):
                raise HfDmsError(
                    f"'{path}' was adapted after attach_, so that its adapters read unmasked inputs. Take the "
                    "gates off with hf_dms.detach_(model), and attach them again before the search."
                )


def copy_search_(searched: nn.Module, model: Any) -> None:
    """Copy the gates of a model, with their state, to another model of the same sizes, in place.

    Args:
        searched: the model with gates.
        model: the model that gets gates.
    """
    attach_(model, gates_of(searched).attachment.config)
    gates_of(model).load_search_state_(gates_of(searched).search_state())


def has_gates(model: nn.Module) -> bool:
    """Whether a model has gates."""
    return "dms_gates" in base_model_of(model)._modules


def _reads_masks(module: nn.Module) -> bool:
    """Whether `attach_` has given a module a hook or a `forward` that reads the masks of gates."""
    functions = (module.__dict__.get("forward"), *module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(isinstance(value, Gates) for function in functions for value in getattr(function, "args", ()))


def gates_of(model: nn.Module) -> Gates:
    """The gates of a model.

    Raises:
        ValueError: the model has none.
    """
    if not has_gates(model):
        raise HfDmsError(f"{type(model).__name__} has no gates. Put them on with hf_dms.attach_(model, dms_config).")
    gates = base_model_of(model)._modules["dms_gates"]
    assert isinstance(gates, Gates)
    return gates


# ---- where masks go, derived from the description --------------------------------------------------------------------
def masked_inputs(bound: BoundSpec, name: str) -> Iterator[tuple[str, int, Span]]:
    """Linear maps and convolutions that read a dim: (module path, row of its gates, its span along `unit_axis`).

    A map that reads the dim twice, one after the other, is there twice.
    """
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        # Two axes are those of a linear map, four those of a convolution; both have their inputs on axis 1.
        if leaf == "weight" and len(param.axes) in (2, 4):
            for span in _spans(bound, name, param.axes[1]):
                yield path, _row(bound, name, param), span


def masked_batch_norms(bound: BoundSpec, name: str) -> Iterator[tuple[str, int, Span]]:
    """Batch norms that take the mask of a dim in place of the maps that read it, in the form of `masked_inputs`."""
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and name in param.axes[0] and is_among(bound, path, "masked_batch_norms"):
            for span in _spans(bound, name, param.axes[0]):
                yield path, _row(bound, name, param), span


def _row(bound: BoundSpec, name: str, param: BoundParam) -> int:
    """The row of a dim's gates that a parameter has to do with."""
    return (param.layer or 0) if bound.rows(name) > 1 else 0


def _spans(bound: BoundSpec, name: str, axis: Axis) -> Iterator[Span]:
    """Where a dim is on an axis: nowhere, once, or in several of the products that follow each other."""
    start, length = 0, bound.product(axis) if name in axis else 0
    for term in terms(axis) if name in axis else ():
        end = start + bound.product(term)
        if name in term:
            place = term.index(name)
            # (kv rep d) at `rep`: kv positions before, rep units, d positions after.
            before, after = bound.product(term[:place]), bound.product(term[place + 1 :])
            yield Span(before, bound.sizes[name], after, start, length - end)
        start = end


def unit_axis(bound: BoundSpec, path: str) -> int:
    """The axis of a map's input that holds its units: 1 for a convolution, the last for a linear map."""
    return 1 if len(bound.params[f"{path}.weight"].axes) == 4 else -1


def norms(bound: BoundSpec, name: str) -> Iterator[str]:
    """Paths of the norms over a dim: the modules with a weight vector of that dim, batch norms excepted.

    A batch norm computes statistics of each unit separately, so leaving units out does not change the others. The
    vector may be a product, such as (four hidden) for a norm over the units of four neighbours.
    """
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        in_vector = len(param.axes) == 1 and name in param.axes[0]
        if leaf == "weight" and in_vector and f"{path}.running_mean" not in bound.buffers:
            yield path


def norm_spans(bound: BoundSpec, path: str, name: str) -> list[Span]:
    """Where a dim, by its own or its scales' name, is on the axis of a norm over it."""
    return list(_spans(bound, name.removeprefix(NORMS), bound.params[f"{path}.weight"].axes[0]))


def scaled_norms(bound: BoundSpec) -> dict[str, list[str]]:
    """Paths of the norms that get scales with `scales: norms`, by `norms.DIM` for the norms over a dim.

    Norms over dims that no cut changes have none. Folding a scale into a norm's weight is only right if the norm
    multiplies by that weight, which norms over the width of a head need not do (Gemma multiplies by 1 + weight).
    """
    dims = [dim.name for dim in bound.spec.dims if dim.scope != "fixed"]
    return {f"{NORMS}{name}": paths for name in dims if (paths := list(norms(bound, name)))}


def _axis_of(bound: BoundSpec, norm: str) -> int:
    """The axis of a norm's input that holds its units."""
    return 1 if is_among(bound, norm, "channels_first") else -1


def unnormed(bound: BoundSpec, name: str) -> Iterator[str]:
    """Paths of the modules that write a dim which is then read without a norm."""
    for path in bound.spec.unnormed:
        param = bound.params.get(f"{bound.prefix}{path}.weight")
        if param is not None and param.axes[0] == (name,):
            yield bound.prefix + path


def response_norms(bound: BoundSpec, name: str) -> Iterator[tuple[str, int]]:
    """Modules that divide by a mean over a dim's units: (path, row of its gates)."""
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and param.axes[-1] == (name,) and is_among(bound, path, "response_norms"):
            yield path, _row(bound, name, param)


def is_among(bound: BoundSpec, path: str, field_name: str) -> bool:
    """Whether a field of the description, a list of patterns, contains a module."""
    patterns = getattr(bound.spec, field_name)
    return any(compiled(pattern).fullmatch(path.removeprefix(bound.prefix)) for pattern in patterns)


def _scales(gates: Gates, bound: BoundSpec, dms_config: DMSConfig) -> dict[str, Tensor]:
    """Scales at their start, θ = 0, for the dims that only maps read, and for norms if asked; see scales.py.

    Raises:
        ValueError: no pruned dim is read by maps only.
    """
    # A scale goes into the columns of the maps that read a unit. Norms, and layers as a whole, are read by no columns.
    read_otherwise = {*bound.stacks} | {
        name for name in gates.dims if [*norms(bound, name), *response_norms(bound, name)]
    }
    scales = {name: torch.zeros_like(gates.raw_importance(name)) for name in gates.dims if name not in read_otherwise}
    for name, paths in scaled_norms(bound).items() if dms_config.scales == "norms" else ():
        units = bound.sizes[name.removeprefix(NORMS)]
        scales[name] = torch.zeros(len(paths), units, device=gates.prune_ratio.device)
    if not scales:
        raise HfDmsError(
            f"dms.scales: units of {', '.join(gates.dims)} can have no scales, those that linear maps read can. Prune "
            "another dim too, such as mlp, or leave scales out."
        )
    return scales


def _mask_reader(module: Any, gates: Gates, parts: list[Part], axis: int) -> list[RemovableHandle]:
    """Make a linear map or a convolution read masked units: by a replaced `forward`, or by the hook that is returned.

    Only plain maps get a replaced `forward`. Others (PEFT's, bitsandbytes', grouped convolutions) do more than their
    weights say, so their input is masked.
    """
    # `type(...) is`, not isinstance: a subclass may do more in its own forward. The weight of a grouped convolution has
    # only the inputs of one group on its axis.
    is_plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    if is_plain:
        module.forward = functools.partial(_masked_map_forward, module, gates, parts, axis)
        return []
    return [module.register_forward_pre_hook(functools.partial(_mask_input, gates, parts, axis))]


# ---- what the hooks do -----------------------------------------------------------------------------------------------
def _compute_masks(gates: Gates, module: nn.Module, args: tuple) -> None:
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


def _mask_input(gates: Gates, parts: list[Part], axis: int, module: nn.Module, args: tuple):
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


def _masked_map_forward(module: Any, gates: Gates, parts: list[Part], axis: int, x: Tensor) -> Tensor:
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
    _masked_map_forward,
    _masked_response_norm_forward,
    _masked_batch_norm_forward,
)  # the methods that `attach_` puts in place of `forward`; `detach_` finds them by this list
