"""`prune`: round the gates to the exact budget, decide which units stay, cut, and check the result.

The check compares the outputs of the cut model with those of the hard-masked model (verify.py). Slicing itself is in
slicing.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.axes import terms
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
from ..gating.outcome import warn_of_gap, warn_of_outcome
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
        model: a model with gates (after a search), or a model without gates if `dms_config` is given. It is not
            modified. In the cut model, active PEFT adapters are merged, and weights packed by bitsandbytes are
            unpacked.
        dms_config: for a model without gates: equal ratios for all dims, units chosen by weight magnitude.
        inputs: keyword arguments of one forward pass, on which the cut model is compared with the masked one.
            Default: transformers' dummy inputs.

    Returns:
        The smaller model, of the class that will be saved, in evaluation mode, on the same device. Its
        `save_pretrained` refuses the folder that `model` was loaded from.

    Raises:
        ValueError: hf_dms does not support the model or the request; the message says why.
        VerificationError: the outputs of the cut model differ from those of the masked model.
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
        # The model gets gates for the time of the call only, so the caller's model comes back as it was.
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
    # Before anything is computed: adapters that were added inside the masks would make the proof fail, with a message
    # that does not name the cause.
    check_gates_outside(model)
    gates = gates_of(model)
    # An embedding that was resized after `attach_` changes what the model costs.
    recount_(gates, model)
    if gates.num_updates == 0:
        warnings.warn(
            "prune: no search has run on these gates; units are chosen by weight magnitude, at equal ratios.",
            stacklevel=2,
        )
        warn_of_gap(model)
    else:
        check_searched(gates)
        warn_of_outcome(model)
    return cut_to(model, _plan_of(model), inputs)


def cut_to(model: PreTrainedModel, plan: Plan, inputs: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Cut a model with gates by a given plan instead of its gates, and check the result; see `prune`.

    Args:
        model: a model with gates; it is not modified.
        plan: which units stay.
        inputs: see `prune`.

    Raises:
        VerificationError: the outputs of the cut model differ from those of the masked model.
    """
    gates = gates_of(model)
    bound = gates.attachment.bound
    pruned = cut(model, bound, plan, gates.attachment.config.layout)
    sizes = {name: torch.tensor(units) for name, units in plan.sizes.items()}
    # In half precision the cut model has its scales rounded into its weights. The masked model must round them in the
    # same way, or the comparison in float32 would find that difference.
    rounds = model.dtype in HALF and can_be_upcast(model)
    scaled = folded(model) if rounds else contextlib.nullcontext()
    # In this order: `folded` takes the scales that `_scaled_by` has set.
    with _ranked_by(gates, plan), _scaled_by(gates, plan), hard_masked(model, sizes), exact_packed_maps(model), scaled:
        inputs = inputs if inputs is not None else dummy_inputs(model)
        check_same(model, pruned, inputs, ("masked", "cut"), output_units(bound, plan))
    keep_source_(pruned, model.name_or_path)
    return pruned


def check_searched(gates: Gates) -> None:
    """Check that a search has ranked the units of every dim.

    Raises:
        ValueError: the importance of a dim is zero everywhere. Ranking would then cut its first units.
    """
    for name in gates.dims:
        if not gates.raw_importance(name).any():
            raise HfDmsError(
                f"prune: after {gates.num_updates} updates every unit of {name} has importance 0, so the first units "
                "would be cut, whatever they contribute. The loss does not depend on them, or its gradients are zero "
                "or underflow: look at the loss, and train in float32 or bfloat16."
            )


def plan_of(model: PreTrainedModel) -> Plan:
    """The plan that `prune` would cut by now.

    Args:
        model: a model with gates; it is not modified.

    Returns:
        Which units stay, per dim and layer.

    Raises:
        ValueError: the model has no gates, or the target cannot be reached.
    """
    model = base_model_of(model)
    recount_(gates_of(model), model)
    return _plan_of(model)


def _plan_of(model: PreTrainedModel) -> Plan:
    gates = gates_of(model)
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
        elif name not in gates.dims:  # of norms: whole, because they are folded into dense weights before these are cut
            scales[name] = theta.unbind(0)
    return Plan(kept, scales)


def magnitude_importance(bound: BoundSpec, model: nn.Module, gates: Gates) -> dict[str, Tensor]:
    """Sum of squares of all weights that disappear with a unit, `[rows, units]` per gated dim."""
    return sum_over_units(bound, gates, lambda name: plain_weight(model, name).float().square())


@torch.no_grad()
def sum_over_units(bound: BoundSpec, gates: Gates, values: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """For each unit, the sum of a value over all weights that disappear with the unit.

    Args:
        bound: the architecture.
        gates: the gates; sums are taken for their dims.
        values: function from a parameter's name in the plain model to a value for each of its weights, in its shape.

    Returns:
        `[rows, units]` float32 per gated dim, on the CPU.
    """
    totals = {name: torch.zeros(dim.rows, dim.units) for name, dim in gates.dims.items()}
    for name, param in bound.params.items():
        # Counted under the name that it is tied to.
        if name in bound.tied:
            continue
        each = values(name).float().cpu()
        # All weights of a layer go with the layer.
        if param.stack in totals:
            totals[param.stack][0, param.layer] += each.sum()
        for place, axis in enumerate(param.axes):
            parts = each.movedim(place, 0).split([bound.product(term) for term in terms(axis)])
            for term, part in zip(terms(axis), parts):
                for dim in set(term) & set(totals):
                    row = param.layer if gates.dims[dim].rows > 1 else 0
                    # A product such as (kv rep d): split into its dims, with everything else flat behind.
                    over_units = part.reshape([bound.sizes[factor] for factor in term] + [-1])
                    # Now `[units of the dim, everything else]`.
                    totals[dim][row] += over_units.movedim(term.index(dim), 0).flatten(1).sum(1)
    return totals


@contextlib.contextmanager
def _ranked(model: PreTrainedModel) -> Iterator[None]:
    """Context: gates that no search has run on rank their units by weight magnitude."""
    gates = gates_of(model)
    searched = gates.num_updates > 0
    # After a search the gates have their own importance, and nothing is replaced.
    importance = {} if searched else magnitude_importance(gates.attachment.bound, model, gates)
    with _importance(gates, importance):
        yield


@contextlib.contextmanager
def _scaled_by(gates: Gates, plan: Plan) -> Iterator[None]:
    """Context: the scales are those of a plan."""
    before = gates.scales
    there = scales_by_unit(plan, gates.attachment.bound)
    gates.scales = {name: scales.to(gates.prune_ratio.device) for name, scales in there.items()}
    try:
        yield
    finally:
        gates.scales = before


@contextlib.contextmanager
def _ranked_by(gates: Gates, plan: Plan) -> Iterator[None]:
    """Context: the units that a plan keeps are the most important ones."""
    kept = {name: torch.zeros_like(gates.raw_importance(name)) for name in plan.kept}
    for name, rows in plan.kept.items():
        for row, units in enumerate(rows):
            # 1 against 0: with as many hard masks as ones, exactly these units are open.
            kept[name][row, units.to(kept[name].device)] = 1
    with _importance(gates, kept):
        yield


@contextlib.contextmanager
def _importance(gates: Gates, importance: Mapping[str, Tensor]) -> Iterator[None]:
    """Context: the gates have another importance."""
    before = {name: gates.raw_importance(name).clone() for name in importance}
    try:
        for name, values in importance.items():
            gates.raw_importance(name).copy_(values)
        yield
    finally:
        for name, values in before.items():
            gates.raw_importance(name).copy_(values)
