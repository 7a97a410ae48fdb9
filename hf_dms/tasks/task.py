"""What a recipe can train a model for: the model class, the processor of its inputs, the measure of its quality.

Named as the Hub names its pipelines. Plain words only, so that a recipe can be checked without waiting for torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: the Hub's pipeline tag.
        model_class: name of transformers' Auto class.
        processor_class: name of the Auto class of what prepares the inputs.
        metric: perplexity or accuracy, of held-out examples.
        speed: what is counted per second, a key of `dms_report.json` and its words.
        ending: what ends the name of its model classes.
        peft: PEFT's name of the task; it decides whether a fresh head trains whole beside adapters.
    """

    name: str
    model_class: str
    processor_class: str
    metric: str
    speed: tuple[str, str]
    ending: str
    peft: str | None


TASKS = {
    task.name: task
    for task in (
        Task(
            "text-generation",
            "AutoModelForCausalLM",
            "AutoTokenizer",
            "perplexity",
            ("tokens_per_second", "prefill tokens/s"),
            "ForCausalLM",
            "CAUSAL_LM",
        ),
        Task(
            "text-classification",
            "AutoModelForSequenceClassification",
            "AutoTokenizer",
            "accuracy",
            ("texts_per_second", "texts/s"),
            "ForSequenceClassification",
            "SEQ_CLS",
        ),
        Task(
            "image-classification",
            "AutoModelForImageClassification",
            "AutoImageProcessor",
            "accuracy",
            ("images_per_second", "images/s"),
            "ForImageClassification",
            None,
        ),
    )
}


def task_of_class(name: str) -> Task | None:
    """The task of a model class, by its name, such as `BertForSequenceClassification`; None if it has none."""
    return next((task for task in TASKS.values() if name.endswith(task.ending)), None)
