"""How good a model is: perplexity or accuracy on held-out examples.

A measure is a mean over examples, so that two models can be compared example by example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from .task import Task


@torch.no_grad()
def example_scores(
    model: PreTrainedModel,
    task: Task,
    examples: Any,
    collate: Callable,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What each example adds to a metric, `[examples]` float64: its loss, or whether it is right.

    Args:
        model: its mode (training or evaluation) is kept.
        task: what it is for.
        examples: a map-style dataset.
        collate: makes a batch of a list of them.
        batch_size: examples per forward pass.
        progress: called after each batch with the number of batches that are done and that of all.
    """
    scores: list[Tensor] = []
    batches = DataLoader(examples, batch_size=batch_size, collate_fn=collate)
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        scores.append(task.score(model, batch).cpu())
        if progress is not None:
            progress(len(scores), len(batches))
    return torch.cat(scores)


def summary(task: Task, scores: Tensor, dense: Tensor | None = None) -> dict[str, float]:
    """A metric and its standard error over examples.

    Args:
        task: what the models are for.
        scores: what `example_scores` returned.
        dense: the same of the dense model on the same examples.

    Returns:
        The metric under its name, `stderr`; with `dense` also `difference`, the mean of the paired differences of the
        scores (accuracy, or nats per token), and `difference_stderr`.
    """
    mean, error = float(scores.mean()), _standard_error(scores)
    value = math.exp(mean) if task.log_scores else mean
    result = {task.metric: value, "stderr": value * error if task.log_scores else error}
    if dense is not None:
        difference = scores - dense
        result |= {"difference": float(difference.mean()), "difference_stderr": _standard_error(difference)}
    return result


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def evenly_spaced(examples: Any, count: int | None) -> Any:
    """At most `count` examples, evenly spaced over all of them; all of them for None."""
    if count is None or len(examples) <= count:
        return examples
    places = torch.linspace(0, len(examples) - 1, count).long()
    return examples[places] if isinstance(examples, Tensor) else Subset(examples, places.tolist())
