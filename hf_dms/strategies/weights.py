"""Criteria without data: weight magnitude, and chance, which every other criterion must beat."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..cut.prune import magnitude_importance
from ..gating.attach import gates_of
from .allocate import Batches, Criterion, Scores


def magnitude_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Sum of squares of all weights that disappear with a unit (Li et al., arXiv 1608.08710, use Σ |w|)."""
    gates = gates_of(model)
    return magnitude_importance(gates.attachment.bound, model, gates)


def random_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Uniform random numbers from torch's global generator."""
    return {name: torch.rand(dim.rows, dim.units) for name, dim in gates_of(model).dims.items()}


MAGNITUDE = Criterion(magnitude_scores, needs_data=False)
# Random scores say nothing about how many units a layer needs, so all layers get equal shares.
RANDOM = Criterion(random_scores, allocation="equal", needs_data=False)
