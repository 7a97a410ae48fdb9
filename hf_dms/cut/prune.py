"""`prune`: round the gates to the exact budget, decide which units stay, cut, and prove the result.

The proof is that the cut model computes what the hard-masked one does. Slicing itself is in slicing.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.plain_view import base_model_of, check_adapters, exact_packed_maps, plain_weight
from ..archs.restoring import HALF
from ..config import SEARCH, DMSConfig
from ..errors import HfDmsError
from ..files import keep_source_
from ..gates import Gates
from ..gating.attach import attach_, check_gates_outside, detach_, gates_of, has_gates
from ..gating.checks import check_model
from ..gating.gates_for import recount_
from ..gating.outcome import say_gap, say_outcome
from ..gating.rounding import sizes_of
from ..gating.scales import folded
from ..resource import Sizes
from ..topk import topk_mask
from .plan import Plan, scales_by_unit
from .slicing import cut
from .verify import can_be_upcast, check_same, dummy_inputs, hard_masked, output_units


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
        A smaller model of the class that will be written, in evaluation mode, on the same device. Its
        `save_pretrained` refuses the folder that `model` was loaded from.

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
        if dms_config.strategy != SEARCH:
            raise HfDmsError(
                f"prune with a dms_config chooses by weight magnitude, and dms.strategy is {dms_config.strategy}. Use "
                "hf_dms.attach_ and hf_dms.choose_ first (docs/strategies.md), or leave strategy out."
            )
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
    recount_(gates, model)
    if gates.num_updates == 0:
        warnings.warn(
            "prune: no search has run on these gates; units are chosen by weight magnitude, at equal ratios.",
            stacklevel=2,
        )
        say_gap(model)
    else:
        check_searched(gates)
        say_outcome(model)
    return cut_to(model, plan_of(model), inputs)


def cut_to(model: PreTrainedModel, plan: Plan, inputs: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Cut a model with gates by a plan of its units, whatever they say now, and prove the result; see `prune`.

    Args:
        model: a model with gates; it is left as it was.
        plan: which units stay.
        inputs: see `prune`.

    Raises:
        VerificationError: the cut model does not compute what the masked one does.
    """
    gates = gates_of(model)
    bound = gates.attachment.bound
    pruned = cut(model, bound, plan, gates.attachment.config.layout)
    sizes = {name: torch.tensor(units) for name, units in plan.sizes.items()}
    rounds = model.dtype in HALF and can_be_upcast(model)
    scaled = folded(model) if rounds else contextlib.nullcontext()
    with _ranked_by(gates, plan), _scaled_by(gates, plan), hard_masked(model, sizes), exact_packed_maps(model), scaled:
        inputs = inputs if inputs is not None else dummy_inputs(model)
        check_same(model, pruned, inputs, ("masked", "cut"), output_units(bound, plan))
    keep_source_(pruned, model.name_or_path)
    return pruned


def check_searched(gates: Gates) -> None:
    """Check that a search has told the units of every dim apart.

    Raises:
        ValueError: the importance of a dim is zero everywhere, so that its first units would be cut.
    """
    for name in gates.dims:
        if not gates.raw_importance(name).any():
            raise HfDmsError(
                f"prune: after {gates.num_updates} updates every unit of {name} has importance 0, so the first ones "
                "would be cut whatever they do. The loss does not depend on them, or its gradients are zero or "
                "underflow: look at the loss, and train in float32 or bfloat16."
            )


def plan_of(model: PreTrainedModel) -> Plan:
    """The units that `prune` keeps of a model with gates as they are now.

    Raises:
        ValueError: the model has no gates, or the target cannot be reached.
    """
    model = base_model_of(model)
    gates = gates_of(model)
    recount_(gates, model)
    with _ranked(model):
        return make_plan(gates, sizes_of(gates))


def make_plan(gates: Gates, sizes: Sizes) -> Plan:
    """The most important units of every row, as many as `sizes` says (per dim `[rows]`)."""
    kept = {}
    for name, size in sizes.items():
        mask = topk_mask(gates.importance(name), size.to(gates.prune_ratio.device))
        kept[name] = tuple(row.nonzero().squeeze(-1).cpu() for row in mask)
    scales = {}
    for name, rows in gates.scales.items():
        theta = rows.detach().float().cpu()
        if name in kept:
            scales[name] = tuple(row[units] for row, units in zip(theta, kept[name]))
        elif name not in gates.dims:
            scales[name] = theta.unbind(0)
    return Plan(kept, scales)


def magnitude_importance(bound: BoundSpec, model: nn.Module, gates: Gates) -> dict[str, Tensor]:
    """Sum of squares of all weights that go with a unit, `[rows, units]` per gated dim."""
    return sum_over_units(bound, gates, lambda name: plain_weight(model, name).float().square())


@torch.no_grad()
def sum_over_units(bound: BoundSpec, gates: Gates, values: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Sums of something that every weight has, over all weights that go with a unit.

    Args:
        bound: the architecture.
        gates: whose dims the units are of.
        values: of a parameter by its name in the plain model, of the parameter's shape.

    Returns:
        `[rows, units]` float32 per gated dim, on the CPU.
    """
    totals = {name: torch.zeros(dim.rows, dim.units) for name, dim in gates.dims.items()}
    for name, param in bound.params.items():
        if name in bound.tied:
            continue
        each = values(name).float().cpu()
        if param.stack in totals:
            totals[param.stack][0, param.layer] += each.sum()
        for place, axis in enumerate(param.axes):
            for dim in set(axis) & set(totals):
                row = param.layer if gates.dims[dim].rows > 1 else 0
                over_units = each.movedim(place, 0).reshape([bound.sizes[factor] for factor in axis] + [-1])
                totals[dim][row] += over_units.movedim(axis.index(dim), 0).flatten(1).sum(1)
    return totals


@contextlib.contextmanager
def _ranked(model: PreTrainedModel) -> Iterator[None]:
    """Let gates that no search has run on rank their units by weight magnitude for a while."""
    gates = gates_of(model)
    searched = gates.num_updates > 0
    importance = {} if searched else magnitude_importance(gates.attachment.bound, model, gates)
    with _importance(gates, importance):
        yield


@contextlib.contextmanager
def _scaled_by(gates: Gates, plan: Plan) -> Iterator[None]:
    """Let the scales be those of a plan for a while."""
    before = gates.scales
    there = scales_by_unit(plan, gates.attachment.bound)
    gates.scales = {name: scales.to(gates.prune_ratio.device) for name, scales in there.items()}
    try:
        yield
    finally:
        gates.scales = before


@contextlib.contextmanager
def _ranked_by(gates: Gates, plan: Plan) -> Iterator[None]:
    """Let the units that a plan keeps be the most important ones for a while."""
    kept = {name: torch.zeros_like(gates.raw_importance(name)) for name in plan.kept}
    for name, rows in plan.kept.items():
        for row, units in enumerate(rows):
            kept[name][row, units.to(kept[name].device)] = 1
    with _importance(gates, kept):
        yield


@contextlib.contextmanager
def _importance(gates: Gates, importance: Mapping[str, Tensor]) -> Iterator[None]:
    """Let units of gates have another importance for a while."""
    before = {name: gates.raw_importance(name).clone() for name in importance}
    try:
        for name, values in importance.items():
            gates.raw_importance(name).copy_(values)
        yield
    finally:
        for name, values in before.items():
            gates.raw_importance(name).copy_(values)
