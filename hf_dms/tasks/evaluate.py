"""The quality of a model: perplexity, accuracy or mean average precision on held-out examples.

The first two are means over examples, so two models can be compared example by example. For a metric that is not a
mean, the standard error is the jackknife's: the metric is computed without each of some parts of the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
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
    """Scores of examples.

    Args:
        model: the model. It runs in its current mode (training or evaluation).
        task: its task.
        examples: a map-style dataset.
        collate: function that makes a batch from a list of examples.
        batch_size: examples per forward pass.
        progress: called after each batch with the number of batches that are done and the number of all.

    Returns:
        `[examples]` float64: the loss of each example, or 1 if the prediction is right and 0 if not. If the metric is
        not a mean, `[examples, rows, columns]`: what is found in each example, padded with rows of NaN.
    """
    scores: list[Tensor] = []
    batches = DataLoader(examples, batch_size=batch_size, collate_fn=collate)
    for batch in batches:
        scores.append(task.score(model, send_to_device(batch, model.device)).cpu())
        if progress is not None:
            progress(len(scores), len(batches))
    if task.of_all is None:
        return torch.cat(scores)
    # Images have different numbers of boxes. Rows of NaN are neither true nor found boxes.
    return pad_sequence([each for batch in scores for each in batch], batch_first=True, padding_value=math.nan)


def summary(task: Task, scores: Tensor, dense: Tensor | None = None) -> dict[str, float]:
    """A metric and its standard error over examples.

    Args:
        task: the task of the models.
        scores: the result of `example_scores`.
        dense: the scores of the dense model on the same examples.

    Returns:
        The metric under its name, and `stderr`. With `dense` also `difference` and `difference_stderr`. The difference
        is the mean of the paired differences of the scores (accuracy, or nats per token). For a metric that is not a
        mean it is the difference of the metric.
    """
    if task.of_all is not None:
        value, parts = task.of_all(scores)
        result = {task.metric: value, "stderr": _jackknife_error(parts)}
        if dense is not None:
            of_dense, parts_of_dense = task.of_all(dense)
            error = _jackknife_error(parts - parts_of_dense)
            result |= {"difference": value - of_dense, "difference_stderr": error}
        return result
    mean, error = float(scores.mean()), _standard_error(scores)
    value = math.exp(mean) if task.log_scores else mean
    # The standard error of exp(x) is exp(x) times that of x, to first order.
    result = {task.metric: value, "stderr": value * error if task.log_scores else error}
    if dense is not None:
        difference = scores - dense
        result |= {"difference": float(difference.mean()), "difference_stderr": _standard_error(difference)}
    return result


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _jackknife_error(values: Tensor) -> float:
    """The standard error of a statistic from its values without each of P parts of the examples, of equal size.

    √((P - 1) / P · Σ (value - mean)²): Efron and Stein, "The jackknife estimate of variance", 1981. If each part is one
    example, it is the usual standard error of a mean. It is NaN for a single part.
    """
    count = len(values)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt()) if count > 1 else math.nan


def evenly_spaced(examples: Any, count: int | None) -> Any:
    """At most `count` examples, evenly spaced; all examples if `count` is None."""
    if count is None or len(examples) <= count:
        return examples
    # Evenly spaced, because rows are often sorted: by class, by document, by date.
    places = torch.linspace(0, len(examples) - 1, count).long()
    return examples[places] if isinstance(examples, Tensor) else Subset(examples, places.tolist())
