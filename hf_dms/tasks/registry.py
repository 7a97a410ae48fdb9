"""The tasks that hf_dms supports, and the task of a model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from ..archs.registry import class_name
from ..errors import HfDmsError
from ..files import load_saved
from .classification import TEXT_CLASSIFICATION
from .data import DataConfig
from .detection import OBJECT_DETECTION
from .generation import TEXT_GENERATION
from .images import IMAGE_CLASSIFICATION
from .labels import Head, head_of
from .task import Examples, Task

TASKS = {task.name: task for task in (TEXT_GENERATION, TEXT_CLASSIFICATION, IMAGE_CLASSIFICATION, OBJECT_DETECTION)}


def task_of_class(name: str) -> Task | None:
    """The task of a model class, by its name, such as `BertForSequenceClassification`; None if it has none."""
    return next((task for task in TASKS.values() if name.endswith(task.ending)), None)


def task_of(path: str) -> tuple[Task, Any]:
    """The task of a saved model, by its class, and its config.

    Raises:
        HfDmsError: there is no model, or its class belongs to no supported task.
    """
    config = load_saved(AutoConfig, path)
    name = class_name(config)
    if (task := task_of_class(name)) is not None:
        return task, config
    endings = ", ".join(task.ending for task in TASKS.values())
    raise HfDmsError(f"'{path}' holds a {name or 'model without a class'}; expected one of {endings}.")


def load_examples(
    config: DataConfig, task: Task, processor: Any, model_config: Any, *, new_head: bool = False
) -> Examples:
    """The examples of a recipe, to train and to measure on. They are read, checked and tokenised once.

    Args:
        config: the `data` section.
        task: the task.
        processor: the model's tokenizer or image processor.
        model_config: the model's config. Values that it must have for these examples are in the result's `config`.
        new_head: whether the head will be randomly initialised, also if the config names classes.

    Raises:
        HfDmsError: the data cannot be read or does not fit the model, or a label is not a class of its head.
    """
    head = None if task.generates else head_of(model_config, task.ending, new_head, task.fewest_classes)
    return task.load(config, processor, model_config, head)


def load_more_examples(
    config: DataConfig, task: Task, processor: Any, model_config: Any, examples: Examples
) -> Examples:
    """Examples from another source, with the same classes.

    Args:
        config: the data section of the other source.
        task: the task.
        processor: the model's tokenizer or image processor.
        model_config: the model's config.
        examples: the examples of the first source.

    Raises:
        HfDmsError: as for `load_examples`; or there is a label that the first source does not have.
    """
    return task.load(config, processor, model_config, Head(examples.labels, is_fixed=True))
