"""GISP: iterative global Taylor pruning (Wang et al., "From Local to Global", arXiv 2510.18030).

Units are worth Σ |w·dL/dw| over their weights; the least worthy of the whole model go, a few at a time, and what is
left is scored anew on the masked model. A unit that is gone has no gradient, so it stays gone: the cuts are nested.

Faithful: first-order scores of the model's own loss summed over a structure, one threshold for all layers, an iterative
schedule, frozen weights. Not: their block-wise normalisation, in place of which scores are divided by what a unit costs
(as for every criterion here), and their step size; here the target falls by an equal factor in each of STEPS steps, and
each step sees a share of the batches of its own.
"""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedModel

from ..gating.attach import gates_of
from .allocate import Batches, Criterion, Scores, sizes_of_scores
from .taylor import element_scores

STEPS = 8


def gisp_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Σ |w·dL/dw| over a unit's weights in the model as it is masked before the last step, 0 for units that are gone.

    Args:
        model: a model with gates; their importance is that of the step before the last afterwards.
        batches: keyword arguments of forward passes, with labels; split evenly over the steps.
    """
    gates = gates_of(model)
    schedule, steps = gates.schedule, min(STEPS, len(batches))
    try:
        for step in range(1, steps + 1):
            share = batches[(step - 1) * len(batches) // steps : step * len(batches) // steps]
            scores = element_scores(model, share)
            if step < steps:
                gates.schedule = dataclasses.replace(schedule, target=schedule.target ** (step / steps))
                gates.rounded = {name: size.long() for name, size in sizes_of_scores(gates, scores).items()}
    finally:
        gates.schedule, gates.rounded = schedule, None
    return scores


GISP = Criterion(gisp_scores)
