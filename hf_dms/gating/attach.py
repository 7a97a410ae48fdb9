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

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec, bind
from ..archs.plain_view import adapted_layers, base_model_of, check_adapters, tensor_of
from ..archs.registry import spec_for
from ..config import DMSConfig
from ..errors import HfDmsError
from ..files import keep_source_, keeps_source
from ..gates import Gates
from .checks import check_as_built, check_attachable, check_model
from .gates_for import build_gates, for_stages
from .hooks import MASKED_FORWARDS, compute_masks, hooks_for_masks, hooks_for_scales, mask_input, masked_map_forward
from .places import NORMS, norms, response_norms, scaled_norms
from .rounding import check_target, rounded_of
from .share import with_share


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
    hooks = [model.register_forward_pre_hook(functools.partial(compute_masks, gates))]
    hooks += [*hooks_for_masks(model, gates, bound), *hooks_for_scales(model, gates, bound)]
    keep = not keeps_source(model)  # a model that `prune` returned refuses already, and `detach_` must leave that
    gates.attachment = Attachment(bound, dms_config, model.config, hooks, keeps_source=keep)
    if keep:
        keep_source_(model, model.name_or_path)
    # Last: until there is an attachment, hard masks have no request to round by.
    gates.rounder = rounded_of


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
            if getattr(hook, "func", None) in (mask_input, masked_map_forward):
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
    gates_of(model).scale_power = gates_of(searched).scale_power


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


# ---- what the hooks do -----------------------------------------------------------------------------------------------
