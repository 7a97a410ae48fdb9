"""What a recipe can prune a model for: all that differs between tasks is one object, which the rest of hf_dms asks.

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
    """What a model of a task is trained and measured on.

    Attributes:
        train, held_out: map-style datasets of a model's keyword arguments, labels among them.
        collate: makes a batch of a list of them.
        labels: names of the classes, in order; empty for text-generation.
        unit: what an example is, for humans.
        config: values that the model's config must have for these examples: names of classes, the padding token.
    """

    train: Any
    held_out: Any
    collate: Callable[[list], dict[str, Any]]
    labels: tuple[str, ...]
    unit: str
    config: dict[str, Any] = field(default_factory=dict)


class SampleOptions(Protocol):
    """What a recipe's `eval` section says about samples."""

    prompt: str | list[str]
    new_tokens: int
    samples: int


Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: the Hub's pipeline tag.
        model_class: name of transformers' Auto class.
        processor_class: name of the Auto class of what prepares the inputs.
        ending: what ends the name of its model classes.
        peft: PEFT's name of the task; it decides whether a fresh head trains whole beside adapters.
        generates: whether its models write text; they need a cache then.
        metric: perplexity, accuracy or mean_average_precision, of held-out examples.
        log_scores: whether the metric is exp of the mean score; else it is the mean itself.
        fewest_classes: how many classes a head has at least; one with fewer is none of this task. 0 without classes.
        num_held_out: how many held-out examples are measured on, unless the recipe says otherwise; None for all.
        speed: what is counted per second, a key of `dms_report.json` and its words.
        amount: how much of that a batch is.
        load: examples from the `data` section, a processor, the model's config and, for classifiers, its classes.
        score: what each example of a batch adds to the metric, `[batch]` float64; or what is found in it,
            `[batch, rows, columns]`, where the metric is no mean.
        samples: a few inputs for the report, each with empty `outputs`.
        answers: those samples with what a model, under a name, makes of each.
        of_all: the metric where it is no mean over examples: of all examples, and without each of some parts of them,
            from what `score` returned for all; None where it is a mean.
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
