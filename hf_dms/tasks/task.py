"""A task is what a model is for. All that differs between tasks is in one `Task` object.

registry.py lists the tasks. To add one, write a file like images.py and list it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from .data import DataConfig


@dataclass(frozen=True)
class Examples:
    """The training and held-out examples for a model.

    Attributes:
        train, held_out: map-style datasets of a model's keyword arguments, including labels.
        collate: function that makes a batch from a list of examples.
        labels: names of the classes, in order; empty for text-generation.
        unit: what an example is, in words.
        config: values that the model's config must have for these examples: names of classes, the padding token.
    """

    train: Any
    held_out: Any
    collate: Callable[[list], dict[str, Any]]
    labels: tuple[str, ...]
    unit: str
    config: dict[str, Any] = field(default_factory=dict)


class SampleOptions(Protocol):
    """The part of a recipe's `eval` section that is about samples."""

    prompt: str | list[str]
    new_tokens: int
    samples: int


Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: the Hub's pipeline tag.
        model_class: name of transformers' Auto class for models.
        processor_class: name of the Auto class for the tokenizer or image processor.
        ending: ending of the names of its model classes.
        peft: PEFT's name of the task. It decides whether a new head is trained in full beside adapters.
        generates: whether its models write text. They then need a cache.
        metric: perplexity, accuracy or mean_average_precision, on held-out examples.
        log_scores: whether the metric is exp of the mean score, or else the mean itself.
        fewest_classes: smallest number of classes of a head for this task; 0 for tasks without classes.
        num_held_out: default number of held-out examples to measure on; None for all.
        speed: what is counted per second: a key of `dms_report.json`, and its words.
        amount: function that counts this in a batch.
        load: function that makes examples from the `data` section, a processor, the model's config and, for
            classifiers, its classes.
        score: function that gives the score of each example of a batch, `[batch]` float64. If the metric is not a mean
            over examples, it gives what is found in each, `[batch, rows, columns]`.
        samples: function that gives a few inputs for the report, each with empty `outputs`.
        answers: function that adds a model's outputs to these samples, under the model's name.
        of_all: for a metric that is not a mean over examples: function from the scores of all examples to the metric of
            all, and to its values without each of some parts of them. None for a mean.
    """

    name: str
    model_class: str
    processor_class: str
    ending: str
    peft: str | None
    generates: bool
    metric: str
    log_scores: bool
    fewest_classes: int
    num_held_out: int | None
    speed: tuple[str, str]
    amount: Callable[[Mapping[str, Any]], int]
    load: Callable[[DataConfig, Any, Any, Any], Examples]
    score: Callable[[PreTrainedModel, Mapping[str, Any]], Tensor]
    samples: Callable[[Examples, Any, SampleOptions], list[Sample]]
    answers: Callable[[list[Sample], str, PreTrainedModel, Any, Examples, SampleOptions], list[Sample]]
    of_all: Callable[[Tensor], tuple[float, Tensor]] | None = None
