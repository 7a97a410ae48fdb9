"""Slicing: a smaller model of the class that will be written, from the units that a plan keeps.

It is `index_select` on the axes that the architecture's description names, and for layout padded zeros behind what
stays. Nothing here knows a module's name.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from ..archs.bind import BoundSpec
from ..archs.plain_view import plain_buffers, plain_weight
from ..errors import VerificationError
from ..gating.scales import folded_scales
from .formats import pruned_class_and_config
from .plan import Plan, kept_units, scales_by_unit


@torch.no_grad()
def cut(model: PreTrainedModel, bound: BoundSpec, plan: Plan, layout: str) -> PreTrainedModel:
    """A new model that holds the kept units of another.

    Args:
        model: the dense model; its tensors are copied, not shared.
        bound: its architecture.
        plan: which units stay, and their scales.
        layout: uniform, per_layer or padded.
    """
    factors = folded_scales(scales_by_unit(plan, bound), bound)
    cls, config = pruned_class_and_config(model, bound, plan, layout)
    with initialization.no_init_weights():
        pruned = cls._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    sources = source_names(pruned, bound, plan)
    for name, tensor in (*pruned.named_parameters(), *plain_buffers(pruned)):
        source = plain_weight(model, sources[name])
        if sources[name] in factors:
            source = source * factors[sources[name]].to(source.device)
        dtype = model.dtype if isinstance(tensor, nn.Parameter) else source.dtype
        tensor.data = cut_tensor(source, tensor.shape, bound, sources[name], plan, layout).to(dtype, copy=True)
    pruned.to(model.device)  # buffers that are not in the state dict
    pruned.tie_weights()
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


def source_names(pruned: PreTrainedModel, bound: BoundSpec, plan: Plan) -> dict[str, str]:
    """Name of every parameter (tied ones under each of their names) and buffer of a cut model, and its dense one's.

    Args:
        pruned: the cut model; the meta device will do.
        bound: the dense model's architecture.
        plan: which units of it stay.
    """
    kept = {stack: kept_units(plan, stack, None, bound.sizes[stack]).tolist() for stack in bound.stacks}
    prefix = f"{pruned.base_model_prefix}." if bound.prefix else ""  # MistralForQuestionAnswering's is not Llama's
    sources = {}
    for name, _ in (*pruned.named_parameters(remove_duplicate=False), *plain_buffers(pruned)):
        source = bound.prefix + name.removeprefix(prefix) if name.startswith(prefix) else name
        stack, position = bound.layer_of(source)
        if stack is not None and position is not None:
            head, tail = f"{bound.stacks[stack]}.{position}.", f"{bound.stacks[stack]}.{kept[stack][position]}."
            source = tail + source.removeprefix(head)
        sources[name] = source
    return sources


def cut_tensor(tensor: Tensor, shape: torch.Size, bound: BoundSpec, name: str, plan: Plan, layout: str) -> Tensor:
    """What becomes of a parameter in the cut model.

    Args:
        tensor: the whole parameter.
        shape: that of the parameter in the cut model.
        bound: the architecture it belongs to.
        name: its name in the dense model.
        plan: which units stay.
        layout: uniform, per_layer or padded.

    Raises:
        VerificationError: it does not get the shape that it must have.
    """
    tensor = slice_tensor(tensor, bound, name, plan)
    if layout == "padded":
        tensor = pad_tensor(tensor, shape, bound, name)
    if tensor.shape != shape:
        raise VerificationError(f"cut: {name} is {tuple(shape)} in the new model, cut {tuple(tensor.shape)}.")
    return tensor


def slice_tensor(tensor: Tensor, bound: BoundSpec, name: str, plan: Plan) -> Tensor:
    """The part of a parameter that the plan keeps.

    Args:
        tensor: the whole parameter.
        bound: the architecture it belongs to.
        name: its name in the dense model.
        plan: which units stay.
    """
    param = bound.tensor(name)
    for place, axis in enumerate(param.axes):
        if any(factor in plan.kept for factor in axis):
            tensor = tensor.index_select(place, axis_indices(axis, bound, param.layer, plan).to(tensor.device))
    return tensor


def pad_tensor(tensor: Tensor, shape: torch.Size, bound: BoundSpec, name: str) -> Tensor:
    """Put zeros behind the units that a layer kept of its dims, up to the size of the widest layer.

    A unit of zeros changes nothing: it writes 0 to the maps that read it, which have zeros for it too. For the same
    reason it has no gradient, and training leaves it as it is.

    Args:
        tensor: the part of a parameter that stays.
        shape: that of the padded parameter.
        bound: the architecture it belongs to.
        name: its name in the dense model.
    """
    for place, axis in enumerate(bound.tensor(name).axes):
        own = [position for position, factor in enumerate(axis) if bound.spec.dim(factor).scope == "layer"]
        if own and tensor.shape[place] != shape[place]:
            before = bound.product(axis[: own[0]])  # each of these has its own units, and zeros behind them
            blocks = tensor.unflatten(place, (before, -1))
            room = shape[place] // before - blocks.shape[place + 1]
            padding = (0, 0) * (tensor.dim() - 1 - place) + (0, room)
            tensor = nn.functional.pad(blocks, padding).flatten(place, place + 1)
    return tensor


def axis_indices(axis: tuple[str, ...], bound: BoundSpec, layer: int | None, plan: Plan) -> Tensor:
    """Kept positions along an axis that is a product of dims, in order."""
    indices = torch.zeros(1, dtype=torch.long)
    for factor in axis:
        kept = kept_units(plan, factor, layer, bound.sizes[factor])
        indices = (indices[:, None] * bound.sizes[factor] + kept).flatten()
    return indices
