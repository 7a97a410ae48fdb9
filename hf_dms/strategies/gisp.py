"""GISP: iterative global Taylor pruning (Wang et al., "From Local to Global", arXiv 2510.18030).

The score of a unit is Σ |w·dL/dw| over its weights. A few units with the lowest scores of the whole model go at a time,
and the rest is scored again on the masked model. A unit that is gone has no gradient, so it never returns.

As in the paper: first-order scores of the model's own loss, summed over a structure; one threshold for all layers; an
iterative schedule; frozen weights. Different: the paper normalises scores by block, and here they are divided by the
cost of a unit, as for every criterion. The paper has its own step size, and here the target falls by an equal factor in
each of STEPS steps. Each step uses its own share of the batches.
"""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedModel

from ..gating.attach import gates_of
from .allocate import Batches, Criterion, Scores, sizes_of_scores
from .taylor import element_scores

STEPS = 8


def gisp_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Σ |w·dL/dw| over a unit's weights, in the model as masked before the last step; 0 for units that are gone.

    Args:
        model: a model with gates. Afterwards their importance is that of the second last step.
        batches: keyword arguments of forward passes, with labels; split evenly over the steps.
    """
    gates = gates_of(model)
    schedule, steps = gates.schedule, min(STEPS, len(batches))
    try:
        for step in range(1, steps + 1):
            # Whole numbers: every batch is used exactly once, also if the steps do not divide them.
            share = batches[(step - 1) * len(batches) // steps : step * len(batches) // steps]
            scores = element_scores(model, share)
            if step < steps:
                # The last step cuts to the target itself, in `allocate_`.
                gates.schedule = dataclasses.replace(schedule, target=schedule.target ** (step / steps))
                # `element_scores` runs in evaluation mode, and hard masks take these sizes.
                gates.rounded = {name: size.long() for name, size in sizes_of_scores(gates, scores).items()}
    finally:
        gates.schedule, gates.rounded = schedule, None
    return scores


GISP = Criterion(gisp_scores)
