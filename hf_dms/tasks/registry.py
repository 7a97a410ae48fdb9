"""The tasks that hf_dms knows, and which one a model is for."""

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
        HfDmsError: there is no model, or one for no task that is known.
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
    """The examples of a recipe: all that a model is trained and measured on, read, checked and tokenised once.

    Args:
        config: where they are.
        task: what for.
        processor: the model's tokenizer or image processor.
        model_config: the model's; what it must say for these examples is in the result's `config`.
        new_head: whether the head will be randomly initialised, whatever the config says of its classes.

    Raises:
        HfDmsError: something cannot be read, does not fit the model, or a label is no class of its head.
    """
    head = None if task.generates else head_of(model_config, task.ending, new_head, task.fewest_classes)
    return task.load(config, processor, model_config, head)


def load_more_examples(
    config: DataConfig, task: Task, processor: Any, model_config: Any, examples: Examples
) -> Examples:
    """Examples from another source, of the same classes.

    Args:
        config: where they are.
        task: what for.
        processor: the model's tokenizer or image processor.
        model_config: the model's.
        examples: those of the first source.

    Raises:
        HfDmsError: as for `load_examples`; other labels than the first source's are no classes of the head.
    """
    return task.load(config, processor, model_config, Head(examples.labels, is_fixed=True))
