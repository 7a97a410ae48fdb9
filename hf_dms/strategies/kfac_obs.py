"""K-FAC optimal brain surgery: a unit is worth what the loss grows by when it goes and the others are refitted.

Removing the inputs B of a unit from a map that writes into the residual stream costs ½·tr((H⁻¹_BB)⁻¹ W_B G W_Bᵀ), with
H = E[x xᵀ] of its inputs and G = E[g gᵀ] of the loss's gradient at its output (refit/order.py). That is LLM Surgeon's
cost (van der Ouderaa et al., arXiv 2312.17244) for whole units, with costs anew after each block of eight.

Faithful: the K-FAC curvature, costs that count on the refit, one threshold for all layers. Not: their weight updates,
which the comparison's own repair makes; their several shots over the whole model, in place of which the layers are
walked through in order, each on the activations of the model as it is cut in front of it (two walks).
The same plan comes from `hf_dms.one_shot_obs_plan` for a model without gates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cut.verify import open_gates
from ..gating.attach import gates_of
from ..refit.levels import sweep
from ..refit.one_shot import check_layer_dims, factors_of, removal_costs, sizes_below_one_threshold
from .allocate import Batches, Criterion, Scores

WALKS = 2


def kfac_obs_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """What the loss grows by when a unit goes after the cheaper ones, `[rows, units]`; infinite for the last one."""
    gates = gates_of(model)
    bound = gates.attachment.bound
    check_layer_dims(bound, gates.dims, "kfac_obs")
    with open_gates(model):
        factors = factors_of(model, bound, batches)
        widths = {name: gates.dense_sizes()[name].long() for name in gates.dims}
        for _ in range(WALKS):
            maps = sweep(model, bound, batches, factors, widths)
            widths = sizes_below_one_threshold(gates, removal_costs(gates, maps))
    scores: Scores = {name: torch.zeros(dim.rows, dim.units).double() for name, dim in gates.dims.items()}
    for (layer, _), refitted in maps.items():
        order, costs = refitted.elimination.order.cpu(), refitted.elimination.costs.cpu()
        scores[refitted.dim][layer, order] = rising(costs.flip(0) / 2).flip(0).double()
    return scores


def rising(costs: Tensor) -> Tensor:
    """Costs of units in the order in which they go, raised where needed to be above those before: by one float32 step.

    Args:
        costs: `[units]`, not negative.

    Example:
        >>> rising(torch.tensor([1.0, 5.0, 4.0, 6.0])).tolist()
        [1.0, 5.0, 5.000000476837158, 6.0]
    """
    steps = costs.float().view(torch.int32)  # floats that are not negative have the order of their bits
    places = torch.arange(len(steps), dtype=torch.int32, device=steps.device)
    return ((steps - places).cummax(0).values + places).view(torch.float32)


KFAC_OBS = Criterion(kfac_obs_scores, dims=("layer",), passes=1 + WALKS)
