"""One-shot Taylor criteria: how much the loss would change, to first order, if a unit were removed.

Vector-wise: (m·g)² of a mask that multiplies the whole unit, with m = 1 and g = dL/dm. It is the importance of the
search without its moving average (Molchanov et al., arXiv 1906.10771, with gates). Element-wise: Σ |w·dL/dw| over the
unit's weights, the first-order element-wise estimate of LLM-Pruner (Ma et al., arXiv 2305.11627). Its second-order
estimate is not implemented.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cut.prune import sum_over_units
from ..gating.attach import gates_of
from .allocate import Batches, Criterion, Scores, loss_of


def vector_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Mean over batches of (m·g)² with every mask open, without dropout."""
    gates = gates_of(model)
    names, schedule = list(gates.dims), gates.schedule
    total: Scores = {name: torch.zeros_like(gates.raw_importance(name)) for name in names}
    gates.schedule = dataclasses.replace(schedule, warmup_steps=gates.num_updates + 1)  # masks stay open
    model.eval()
    # The gates alone: in training mode they record Taylor terms, and the model has no dropout.
    gates.train()
    try:
        for batch in batches:
            loss_of(model, batch).backward()
            # The square is of each batch's term, as in equation 5: batches with opposite gradients must not cancel.
            for name, term in zip(names, gates.step_terms()):
                total[name] += term.square() / len(batches)
            gates.forget_step_()
    finally:
        gates.schedule = schedule
        gates.eval()
        model.zero_grad()
    return total


def element_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Σ |w·dL/dw| over the weights that disappear with a unit; gradients are summed over the batches first."""
    gates = gates_of(model)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.eval()
    # The weights may be frozen, and w·dL/dw needs their gradients.
    model.requires_grad_(True)
    try:
        for batch in batches:
            loss_of(model, batch).backward()

        def terms(name: str) -> Tensor:
            weight = model.get_parameter(name)
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            return (weight * gradient).detach().abs() / len(batches)

        return sum_over_units(gates.attachment.bound, gates, terms)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.zero_grad()


TAYLOR = Criterion(vector_scores)
TAYLOR_ELEMENTS = Criterion(element_scores)
