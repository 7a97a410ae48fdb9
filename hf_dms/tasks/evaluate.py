"""How good a model is: perplexity, accuracy or mean average precision on held-out examples.

The first two are means over examples, so that two models can be compared example by example. The standard error of a
metric that is no mean is the jackknife's: the metric is taken without each of some parts of the examples.
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
    """What each example adds to a metric, `[examples]` float64: its loss, or whether it is right.

    Where the metric is no mean, `[examples, rows, columns]`, what is found in each one, filled up with rows of NaN.

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
        scores.append(task.score(model, send_to_device(batch, model.device)).cpu())
        if progress is not None:
            progress(len(scores), len(batches))
    if task.of_all is None:
        return torch.cat(scores)
    return pad_sequence([each for batch in scores for each in batch], batch_first=True, padding_value=math.nan)


def summary(task: Task, scores: Tensor, dense: Tensor | None = None) -> dict[str, float]:
    """A metric and its standard error over examples.

    Args:
        task: what the models are for.
        scores: what `example_scores` returned.
        dense: the same of the dense model on the same examples.

    Returns:
        The metric under its name, `stderr`; with `dense` also `difference`, the mean of the paired differences of the
        scores (accuracy, or nats per token) or the difference of a metric that is no mean, and `difference_stderr`.
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
    result = {task.metric: value, "stderr": value * error if task.log_scores else error}
    if dense is not None:
        difference = scores - dense
        result |= {"difference": float(difference.mean()), "difference_stderr": _standard_error(difference)}
    return result


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _jackknife_error(values: Tensor) -> float:
    """The standard error of a statistic from its values without each of P parts of the examples, of equal size.

    √((P - 1) / P · Σ (value - mean)²): Efron and Stein, "The jackknife estimate of variance", 1981. With parts of one
    example it is the usual standard error of a mean. NaN of one part.
    """
    count = len(values)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt()) if count > 1 else math.nan


def evenly_spaced(examples: Any, count: int | None) -> Any:
    """At most `count` examples, evenly spaced over all of them; all of them for None."""
    if count is None or len(examples) <= count:
        return examples
    places = torch.linspace(0, len(examples) - 1, count).long()
    return examples[places] if isinstance(examples, Tensor) else Subset(examples, places.tolist())
