"""Slicing: the smaller model, made from the units that a plan keeps.

It is `index_select` along the axes that the architecture's description gives. Layout padded then adds zeros behind the
kept units. Nothing here knows a module's name.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from ..archs.axes import Axis, terms
from ..archs.bind import BoundSpec
from ..archs.plain_view import plain_buffers, plain_weight
from ..archs.skeleton import attention_of
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

    Returns:
        The cut model in evaluation mode, on the same device and in the same precision. It has not been checked.
    """
    factors = folded_scales(scales_by_unit(plan, bound), bound)
    cls, config = pruned_class_and_config(model, bound, plan, layout)
    # Every parameter is replaced below, so time for random numbers would be wasted.
    with initialization.no_init_weights():
        pruned = cls._from_config(config, dtype=model.dtype, attn_implementation=attention_of(model))
    sources = source_names(pruned, bound, plan)
    for name, tensor in (*pruned.named_parameters(), *plain_buffers(pruned)):
        source = plain_weight(model, sources[name])
        if sources[name] in factors:  # float32: the product is rounded once, to the precision of the model
            source = source * factors[sources[name]].to(source.device)
        # Buffers keep their own precision: running statistics and integer tables are not the model's dtype.
        dtype = model.dtype if isinstance(tensor, nn.Parameter) else source.dtype
        tensor.data = cut_tensor(source, tensor.shape, bound, sources[name], plan, layout).to(dtype, copy=True)
    pruned.to(model.device)  # buffers that are not in the state dict
    pruned.tie_weights()
    if model.can_generate():
        # The class has made one from the config, without what the dense model's generation_config.json says.
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


def source_names(pruned: PreTrainedModel, bound: BoundSpec, plan: Plan) -> dict[str, str]:
    """For each parameter and buffer of a cut model, the name of its source in the dense model.

    A tied parameter appears under each of its names.

    Args:
        pruned: the cut model; the meta device will do.
        bound: the dense model's architecture.
        plan: which units stay.
    """
    # Layer i of the cut model is the i-th layer that stays.
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
    """A parameter of the cut model, from the dense model's.

    Args:
        tensor: the dense parameter.
        shape: shape of the parameter in the cut model.
        bound: the dense model's architecture.
        name: the parameter's name in the dense model.
        plan: which units stay.
        layout: uniform, per_layer or padded.

    Raises:
        VerificationError: the result does not have that shape.
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
        tensor: the dense parameter.
        bound: the dense model's architecture.
        name: the parameter's name in the dense model.
        plan: which units stay.
    """
    param = bound.tensor(name)
    for place, axis in enumerate(param.axes):
        # An axis without a pruned dim would be copied unchanged.
        if any(factor in plan.kept for factor in axis):
            tensor = tensor.index_select(place, axis_indices(axis, bound, param.layer, plan).to(tensor.device))
    return tensor


def pad_tensor(tensor: Tensor, shape: torch.Size, bound: BoundSpec, name: str) -> Tensor:
    """Add zeros behind the units that a layer keeps, up to the size of the widest layer.

    A unit of zeros does not change the outputs: it writes 0, and the maps that read it have zero weights for it. For
    the same reason its gradients are 0, and training does not change it.

    Args:
        tensor: the part of a parameter that stays.
        shape: shape of the padded parameter.
        bound: the dense model's architecture.
        name: the parameter's name in the dense model.
    """
    for place, axis in enumerate(bound.tensor(name).axes):
        own = [position for position, factor in enumerate(axis) if bound.spec.dim(factor).scope == "layer"]
        if own and tensor.shape[place] != shape[place]:
            before = bound.product(axis[: own[0]])  # this many blocks; the zeros go behind the units of each block
            blocks = tensor.unflatten(place, (before, -1))
            room = shape[place] // before - blocks.shape[place + 1]
            # `pad` counts axes from the last one, two numbers each, and `blocks` has one axis more than the tensor.
            padding = (0, 0) * (tensor.dim() - 1 - place) + (0, room)
            tensor = nn.functional.pad(blocks, padding).flatten(place, place + 1)
    return tensor


def axis_indices(axis: Axis, bound: BoundSpec, layer: int | None, plan: Plan) -> Tensor:
    """Kept positions along an axis, in order, int64.

    On a product of dims, the position of a unit is i₁·N₂·N₃ + i₂·N₃ + i₃, as in a flattened array, so kept positions
    are built factor by factor from the left. Products that follow each other begin where the one before ends.
    """
    found, start = [], 0
    for term in terms(axis):
        indices = torch.zeros(1, dtype=torch.long)
        for factor in term:
            kept = kept_units(plan, factor, layer, bound.sizes[factor])
            indices = (indices[:, None] * bound.sizes[factor] + kept).flatten()
        found.append(indices + start)
        start += bound.product(term)
    return torch.cat(found)
