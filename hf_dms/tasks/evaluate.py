"""How good a model is: perplexity or accuracy on held-out examples.

A measure is a mean over examples, so that two models can be compared example by example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, default_collate
from transformers import AutoConfig, PreTrainedModel

from ..errors import HfDmsError
from .task import TASKS, Task, task_of_class


def sequence_losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood per predicted token of each sequence, `[batch]` float64, in nats.

    Each sequence is scored by itself, from its second token on, with no context from the one before.

    Args:
        model: a causal language model.
        batch: `input_ids` `[batch, tokens]`, without padding.
    """
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    labels = batch["input_ids"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.double().view(labels.shape).mean(1)


def correct_predictions(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """1 where the class with the largest logit is the label, else 0: `[batch]` float64.

    Args:
        model: a classifier.
        batch: its inputs, and `labels` `[batch]`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return (model(**inputs).logits.argmax(-1) == batch["labels"]).double()


SCORES: dict[str, Callable] = {"perplexity": sequence_losses, "accuracy": correct_predictions}


@torch.no_grad()
def example_scores(
    model: PreTrainedModel, metric: str, examples: Any, collate: Callable, batch_size: int = 4
) -> Tensor:
    """What each example adds to a metric, `[examples]` float64: its loss, or whether it is right.

    Args:
        model: its mode (training or evaluation) is kept.
        metric: perplexity or accuracy.
        examples: a map-style dataset.
        collate: makes a batch of a list of them.
        batch_size: examples per forward pass.
    """
    scores = []
    for batch in DataLoader(examples, batch_size=batch_size, collate_fn=collate):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        scores.append(SCORES[metric](model, batch).cpu())
    return torch.cat(scores)


def summary(metric: str, scores: Tensor, dense: Tensor | None = None) -> dict[str, float]:
    """A metric and its standard error over examples.

    Args:
        metric: perplexity or accuracy.
        scores: what `example_scores` returned.
        dense: the same of the dense model on the same examples.

    Returns:
        The metric under its name, `stderr`; with `dense` also `difference`, the mean of the paired differences of the
        scores (accuracy, or nats per token), and `difference_stderr`.
    """
    mean, error = float(scores.mean()), _standard_error(scores)
    value = math.exp(mean) if metric == "perplexity" else mean
    result = {metric: value, "stderr": value * error if metric == "perplexity" else error}
    if dense is not None:
        difference = scores - dense
        result |= {"difference": float(difference.mean()), "difference_stderr": _standard_error(difference)}
    return result


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def perplexity(model: PreTrainedModel, sequences: Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood per predicted token, over sequences that do not overlap.

    Args:
        model: a causal language model; its mode (training or evaluation) is kept.
        sequences: `[sequences, tokens]` int64.
        batch_size: sequences per forward pass.
    """
    examples = [{"input_ids": row} for row in sequences]
    return math.exp(float(example_scores(model, "perplexity", examples, default_collate, batch_size).mean()))


def evenly_spaced(examples: Any, count: int | None) -> Any:
    """At most `count` examples, evenly spaced over all of them; all of them for None."""
    if count is None or len(examples) <= count:
        return examples
    places = torch.linspace(0, len(examples) - 1, count).long()
    return examples[places] if isinstance(examples, Tensor) else Subset(examples, places.tolist())


def task_of(path: str) -> tuple[Task, Any]:
    """The task of a saved model, by its class, and its config.

    Raises:
        ValueError: there is no model, or one for no task that is known.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise HfDmsError(f"No model can be read from '{path}'. {str(error).strip().splitlines()[0]}") from error
    name = (config.architectures or [""])[0]
    if (task := task_of_class(name)) is not None:
        return task, config
    endings = ", ".join(task.ending for task in TASKS.values())
    raise HfDmsError(f"'{path}' holds a {name or 'model without a class'}; expected one of {endings}.")
