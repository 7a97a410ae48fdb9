"""K-FAC optimal brain surgery: the score of a unit is the increase of the loss when it goes and the rest is refitted.

Removing the inputs B of a unit from a map that writes into the residual stream costs ½·tr((H⁻¹_BB)⁻¹ W_B G W_Bᵀ), with
H = E[x xᵀ] of its inputs and G = E[g gᵀ] of the loss's gradient at its output (refit/order.py). That is LLM Surgeon's
cost (van der Ouderaa et al., arXiv 2312.17244) for whole units, with costs anew after each block of eight.

As in the paper: the K-FAC curvature, costs that include the refit, one threshold for all layers. Different: the paper
updates weights itself, and here the repair of the comparison does. The paper cuts the whole model in several shots, and
here two walks go through the layers in order, each layer on the activations of the cut model in front of it.
`hf_dms.one_shot_obs_plan` makes the same plan for a model without gates.
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
    """Increase of the loss when a unit goes after all cheaper ones, `[rows, units]`; infinite for the last unit."""
    gates = gates_of(model)
    bound = gates.attachment.bound
    check_layer_dims(bound, gates.dims, "kfac_obs")
    with open_gates(model):
        factors = factors_of(model, bound, batches)
        widths = {name: gates.dense_sizes()[name].long() for name in gates.dims}
        for _ in range(WALKS):
            # The first walk has dense widths; the second sees the activations of the first one's cut.
            maps = sweep(model, bound, batches, factors, widths)
            widths = sizes_below_one_threshold(gates, removal_costs(gates, maps))
    scores: Scores = {name: torch.zeros(dim.rows, dim.units).double() for name, dim in gates.dims.items()}
    for (layer, _), refitted in maps.items():
        order, costs = refitted.elimination.order.cpu(), refitted.elimination.costs.cpu()
        # `costs` begins with the unit that goes last. Flipped, it is in the order of removal.
        scores[refitted.dim][layer, order] = rising(costs.flip(0) / 2).flip(0).double()
    return scores


def rising(costs: Tensor) -> Tensor:
    """Costs in the order of removal, raised where needed to be strictly increasing, by the smallest float32 step.

    One threshold over all units would otherwise remove a cheap unit before the unit that had to go first.

    Args:
        costs: `[units]`, not negative.

    Example:
        >>> rising(torch.tensor([1.0, 5.0, 4.0, 6.0])).tolist()
        [1.0, 5.0, 5.000000476837158, 6.0]
    """
    steps = costs.float().view(torch.int32)  # floats that are not negative have the order of their bits
    places = torch.arange(len(steps), dtype=torch.int32, device=steps.device)
    return ((steps - places).cummax(0).values + places).view(torch.float32)


# One pass for the gradients behind G, and one for each walk.
KFAC_OBS = Criterion(kfac_obs_scores, dims=("layer",), passes=1 + WALKS)
