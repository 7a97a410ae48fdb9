"""text-classification: one class for each text; and the parts that all classifiers have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..errors import HfDmsError
from .data import DataConfig
from .evaluate import evenly_spaced
from .labels import Head, LabelColumn, number_labels, read_labels
from .sources import Source, load_sources
from .task import Examples, Sample, SampleOptions, Task
from .texts import check_ids, check_length, map_texts, padding_of

MAX_CHARACTERS = 400  # a report shows at most this many characters of a text


# ---- all classifiers -------------------------------------------------------------------------------------------------
def load_labelled(
    sources: tuple[Source, Source | None],
    config: DataConfig,
    head: Head,
    prepare: Callable[[Source, list[int]], Any],
    read: Callable[[Source, DataConfig], LabelColumn] = read_labels,
) -> tuple[Any, Any, tuple[str, ...]]:
    """Training examples, held-out examples, and the names of the classes.

    Args:
        sources: the rows to train on, and the held-out rows.
        config: the `data` section: the column of the label, and the share to hold out if there are no held-out rows.
        head: the classes of the model.
        prepare: function of a source and the class number of each label; it returns a `datasets.Dataset` of examples.
        read: function that reads the labels of a source.

    Raises:
        HfDmsError: a label is not a class of the head.
    """
    train, held_out = sources
    labels = read(train, config)
    held_out_labels = labels if held_out is None or held_out is train else read(held_out, config)
    names, numbers = number_labels(labels, held_out_labels, head)
    # Labels come first: reading them is quick, and a mistake is found before anything is tokenised.
    examples = prepare(train, [numbers[label] for label in labels.labels])
    if held_out is None:
        return *_split(examples, config, train), names
    if held_out is train:
        return examples, examples, names
    return examples, prepare(held_out, [numbers[label] for label in held_out_labels.labels]), names


def _split(examples: Any, config: DataConfig, source: Source) -> tuple[Any, Any]:
    """Split examples at random with seed 0, so that every run holds out the same ones."""
    try:
        parts = examples.train_test_split(test_size=config.held_out, seed=0)
    except ValueError as error:
        raise HfDmsError(
            f"data.held_out: no share of {config.held_out} can be held out of {len(examples)} rows of {source.path} "
            f"({error}). Give more rows, another share, or a file."
        ) from error
    return parts["train"], parts["test"]


def config_values(names: tuple[str, ...]) -> dict[str, Any]:
    """The values of a classifier's config that name its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def correct_predictions(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """1 if the class with the largest logit is the label, or else 0: `[batch]` float64.

    Args:
        model: a classifier.
        batch: its inputs, and `labels` `[batch]`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return (model(**inputs).logits.argmax(-1) == batch["labels"]).double()


def samples_shown_as(show: Callable[[Any, Any], str]) -> Callable[[Examples, Any, SampleOptions], list[Sample]]:
    """`Task.samples` of a classifier: some held-out examples.

    Args:
        show: function of an example and the processor that returns the example in words or as a data URI.
    """

    def samples(examples: Examples, processor: Any, options: SampleOptions) -> list[Sample]:
        rows = sample_rows(examples, options)
        labels = [examples.labels[int(row["labels"])] for row in rows]
        return [
            {"input": show(row, processor), "label": label, "outputs": {}, "probabilities": {}}
            for row, label in zip(rows, labels)
        ]

    return samples


@torch.no_grad()
def predicted(
    samples: list[Sample], name: str, model: PreTrainedModel, processor: Any, examples: Examples, options: SampleOptions
) -> list[Sample]:
    """Each sample with the class that a model predicts, and its probability; see `Task.answers`."""
    if not samples:
        return samples
    batch = examples.collate(sample_rows(examples, options))
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    probabilities, classes = model(**inputs).logits.float().softmax(-1).max(-1)
    return [
        sample
        | {
            "outputs": sample["outputs"] | {name: examples.labels[number]},
            "probabilities": sample["probabilities"] | {name: round(probability, 4)},
        }
        for sample, probability, number in zip(samples, probabilities.tolist(), classes.tolist())
    ]


def sample_rows(examples: Examples, options: SampleOptions) -> list[Any]:
    if not options.samples:
        return []
    rows = evenly_spaced(examples.held_out, options.samples)
    return [rows[i] for i in range(len(rows))]


# ---- texts -----------------------------------------------------------------------------------------------------------
def load_examples(config: DataConfig, tokenizer: Any, model_config: Any, head: Head) -> Examples:
    """Tokenised texts with the numbers of their classes; see `Task.load`."""
    from pyarrow import compute

    padding, values = padding_of(tokenizer, model_config)

    def prepare(source: Source, numbers: list[int]) -> Any:
        rows = map_texts(source, config, tokenizer, lambda texts, places: encode(texts, places, source, numbers))
        ids = rows.data.column("input_ids")
        # In Arrow, where the tokens are: as Python integers they would take many times the memory.
        longest, largest = (
            compute.max(each(ids)).as_py() for each in (compute.list_value_length, compute.list_flatten)
        )
        check_length(longest, f"A text of {source.key} has", model_config)
        # A padding token is often added to a tokenizer later, beyond the model's vocabulary, and occurs in batches
        # only.
        check_ids(max(largest, padding.pad_token_id), tokenizer, model_config)
        return rows

    def encode(texts: list[str | None], places: list[int], source: Source, numbers: list[int]) -> dict[str, list]:
        column = config.text_column
        for text, place in zip(texts, places):
            if text is None:
                raise HfDmsError(f"{source.cell(place, column)} has no text. Leave such rows out, or fill them.")
        encoded = dict(tokenizer(texts, truncation=True, max_length=config.sequence_length))
        # Only now, because most tokenizers make special tokens of an empty text, on which a model can run.
        for row, place in zip(encoded["input_ids"], places):
            if not row:
                raise HfDmsError(f"{source.cell(place, column)} is empty. Leave such rows out, or fill them.")
        return encoded | {"labels": [numbers[place] for place in places]}

    train, held_out, names = load_labelled(load_sources(config), config, head, prepare)
    return Examples(train, held_out, DataCollatorWithPadding(padding), names, "texts", config_values(names) | values)


def shortened(example: Any, tokenizer: Any) -> str:
    """A text as a model sees it, shortened for a report."""
    text = tokenizer.decode(example["input_ids"], skip_special_tokens=True)
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


TEXT_CLASSIFICATION = Task(
    name="text-classification",
    model_class="AutoModelForSequenceClassification",
    processor_class="AutoTokenizer",
    ending="ForSequenceClassification",
    peft="SEQ_CLS",
    generates=False,
    metric="accuracy",
    log_scores=False,
    fewest_classes=2,
    num_held_out=None,
    speed=("texts_per_second", "texts/s"),
    amount=lambda batch: len(batch["labels"]),
    load=load_examples,
    score=correct_predictions,
    samples=samples_shown_as(shortened),
    answers=predicted,
)
