"""Cut: a smaller model of the class that will be written, from the units that a plan keeps.

`prune` is the public entry: it rounds the gates to the exact budget, decides which units stay, builds the smaller model
and proves that it computes what the hard-masked one does. Slicing is `index_select` on the axes that the architecture's
description names, and for layout padded zeros behind what stays; nothing here knows a module's name.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from ..archs.plain_view import base_model_of, check_adapters, exact_packed_maps, plain_weight
from ..archs.spec import BoundSpec
from ..config import DMSConfig
from ..errors import HfDmsError, VerificationError
from ..gates import Gates
from ..gating.attach import attach_, check_gates_outside, detach_, gates_of, has_gates
from ..gating.checks import check_model
from ..gating.rounding import round_sizes
from ..resource import Sizes
from ..topk import topk_mask
from .formats import Plan, kept_units, pruned_class_and_config
from .verify import check_same, dummy_inputs, hard_masked, output_units


def prune(
    model: PreTrainedModel, dms_config: DMSConfig | None = None, inputs: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Cut a model to its exact budget.

    Args:
        model: a model with gates (after a search), or, with `dms_config`, one without. It is left as it was.
            Active adapters of PEFT are merged into the cut model, weights packed by bitsandbytes are unpacked in it.
        dms_config: for a model without gates: equal ratios for all dims, units chosen by weight magnitude.
        inputs: keyword arguments of one forward pass, on which the cut model is compared with the masked one.
            Default: transformers' dummy inputs.

    Returns:
        A smaller model of the class that will be written, in evaluation mode, on the same device.

    Raises:
        ValueError: the model or the request is one that cannot be served.
        VerificationError: the cut model does not compute what the masked one does.
    """
    check_model(base_model_of(model), "prune")
    check_adapters(model)
    model = base_model_of(model)
    if not has_gates(model):
        if dms_config is None:
            raise HfDmsError("prune needs a model with gates (hf_dms.attach_), or a dms_config.")
        attach_(model, dms_config)
        try:
            return prune(model, inputs=inputs)
        finally:
            detach_(model)
    if dms_config is not None:
        raise HfDmsError(
            "prune got a dms_config for a model that has gates, which have a request of their own. Leave it out, or "
            "take the gates off with hf_dms.detach_(model) first."
        )
    check_gates_outside(model)
    gates = gates_of(model)
    bound, config = gates.attachment.bound, gates.attachment.config
    if gates.num_updates == 0:
        warnings.warn(
            "prune: no search has run on these gates; units are chosen by weight magnitude, at equal ratios.",
            stacklevel=2,
        )
    plan = plan_of(model)
    pruned = cut(model, bound, plan, config.layout)
    sizes = {name: torch.tensor(units) for name, units in plan.sizes.items()}
    with _ranked(model), hard_masked(model, sizes), exact_packed_maps(model):
        inputs = inputs if inputs is not None else dummy_inputs(model)
        check_same(model, pruned, inputs, ("masked", "cut"), output_units(model, bound, plan))
    return pruned


# ---- which units stay ------------------------------------------------------------------------------------------------
def plan_of(model: PreTrainedModel) -> Plan:
    """The units that `prune` keeps of a model with gates as they are now.

    Raises:
        ValueError: the model has no gates, or the target cannot be reached.
    """
    model = base_model_of(model)
    gates = gates_of(model)
    with _ranked(model):
        return make_plan(gates, round_sizes(gates, gates.attachment.bound, gates.attachment.config, model.config))


def make_plan(gates: Gates, sizes: Sizes) -> Plan:
    """The most important units of every row, as many as `sizes` says (per dim `[rows]`)."""
    kept = {}
    for name, size in sizes.items():
        mask = topk_mask(gates.importance(name), size.to(gates.prune_ratio.device))
        kept[name] = tuple(row.nonzero().squeeze(-1).cpu() for row in mask)
    return Plan(kept)


@torch.no_grad()
def magnitude_importance(bound: BoundSpec, model: nn.Module, gates: Gates) -> dict[str, Tensor]:
    """Sum of squares of all weights that go with a unit, `[rows, units]` per gated dim."""
    importance = {name: torch.zeros(dim.rows, dim.units) for name, dim in gates.dims.items()}
    for name, param in bound.params.items():
        if name in bound.tied:
            continue
        squares = plain_weight(model, name).float().square().cpu()
        if param.layer is not None and bound.depth in importance:
            importance[bound.depth][0, param.layer] += squares.sum()
        for place, axis in enumerate(param.axes):
            for dim in set(axis) & set(importance):
                row = param.layer if gates.dims[dim].rows > 1 else 0
                over_units = squares.movedim(place, 0).reshape([bound.sizes[factor] for factor in axis] + [-1])
                importance[dim][row] += over_units.movedim(axis.index(dim), 0).flatten(1).sum(1)
    return importance


@contextlib.contextmanager
def _ranked(model: PreTrainedModel) -> Iterator[None]:
    """Let gates that no search has run on rank their units by weight magnitude for a while."""
    gates = gates_of(model)
    searched = gates.num_updates > 0
    importance = {} if searched else magnitude_importance(gates.attachment.bound, model, gates)
    before = {name: gates.raw_importance(name).clone() for name in importance}
    try:
        for name, values in importance.items():
            gates.raw_importance(name).copy_(values)
        yield
    finally:
        for name, values in before.items():
            gates.raw_importance(name).copy_(values)


# ---- cutting ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def cut(model: PreTrainedModel, bound: BoundSpec, plan: Plan, layout: str) -> PreTrainedModel:
    """A new model that holds the kept units of another.

    Args:
        model: the dense model; its tensors are copied, not shared.
        bound: its architecture.
        plan: which units stay.
        layout: uniform, per_layer or padded.
    """
    cls, config = pruned_class_and_config(model, bound, plan, layout)
    with initialization.no_init_weights():
        pruned = cls._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    sources = source_names(pruned, bound, plan)
    for name, parameter in pruned.named_parameters():
        source = plain_weight(model, sources[name])
        parameter.data = cut_tensor(source, parameter.shape, bound, sources[name], plan, layout).to(
            model.dtype, copy=True
        )
    pruned.to(model.device)  # buffers
    pruned.tie_weights()
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


def source_names(pruned: PreTrainedModel, bound: BoundSpec, plan: Plan) -> dict[str, str]:
    """Name of every parameter of a cut model (tied ones under each of their names), and its name in the dense one.

    Args:
        pruned: the cut model; the meta device will do.
        bound: the dense model's architecture.
        plan: which units of it stay.
    """
    kept_layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    prefix = f"{pruned.base_model_prefix}." if bound.prefix else ""  # MistralForQuestionAnswering's is not Llama's
    sources = {}
    for name, _ in pruned.named_parameters(remove_duplicate=False):
        source = bound.prefix + name.removeprefix(prefix) if name.startswith(prefix) else name
        if (position := _layer_position(source, bound.layers_path)) is not None:
            head, tail = f"{bound.layers_path}.{position}.", f"{bound.layers_path}.{kept_layers[position]}."
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
    param = bound.params[name]
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
    for place, axis in enumerate(bound.params[name].axes):
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


def _layer_position(name: str, layers_path: str) -> int | None:
    if not name.startswith(f"{layers_path}."):
        return None
    return int(name.removeprefix(f"{layers_path}.").partition(".")[0])
