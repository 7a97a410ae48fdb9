"""Examples for a search and for its evaluation: `datasets` loads them, the model's processor prepares them.

Text for generation is packed into sequences; texts and images with labels stay one example each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, default_data_collator

from ..errors import HfDmsError
from .task import Task

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataConfig:
    """The `data` section of a recipe."""

    path: str = field(  # type: ignore[assignment]  # None is refused below
        default=None,
        metadata={
            "help": "A file (txt, jsonl, json, parquet, csv), a folder of images with a subfolder per label, or the "
            "Hub id of a dataset. Required."
        },
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split to search on."})
    text_column: str = field(
        default="text", metadata={"help": "Column with the text, or with chat messages (the chat template is applied)."}
    )
    template: str | None = field(
        default=None,
        metadata={"help": "Text of a row in place of text_column, its columns in braces: 'Q: {question} A: {answer}'."},
    )
    image_column: str = field(default="image", metadata={"help": "Column with the image, for image-classification."})
    label_column: str = field(default="label", metadata={"help": "Column with the label, a name or a number."})
    sequence_length: int = field(
        default=512,
        metadata={
            "help": "Tokens per sequence; documents are packed, an end-of-text token between them. For "
            "text-classification: where longer texts are cut off."
        },
    )
    held_out: str | float = field(
        default=0.05,
        metadata={"help": "What to evaluate on: a file like `path`, another split's name, or a share of the data."},
    )

    def __post_init__(self) -> None:
        if self.path is None:
            raise HfDmsError(
                "data.path is required: a txt, jsonl, parquet or csv file, a folder of images, or the Hub id of a "
                "dataset."
            )
        if isinstance(self.held_out, int | float) and not 0 < self.held_out < 1:
            raise HfDmsError(f"data.held_out must be a share in (0, 1), a file or a split, got {self.held_out}.")
        if self.sequence_length < 2:
            raise HfDmsError(f"data.sequence_length must be at least 2, got {self.sequence_length}.")
        for key in ("path", "held_out"):
            value = getattr(self, key)
            if isinstance(value, str) and Path(value).suffix in BUILDERS and not Path(value).is_file():
                raise HfDmsError(f"data.{key}: there is no file '{value}' (looked in {Path.cwd()}).")


@dataclass(frozen=True)
class Examples:
    """What a model of a task is trained and measured on.

    Attributes:
        train, held_out: map-style datasets of a model's keyword arguments, labels among them.
        collate: makes a batch of a list of them.
        labels: names of the classes, in order; empty for text-generation.
        unit: what an example is, for humans.
    """

    train: Any
    held_out: Any
    collate: Callable[[list], dict[str, Tensor]]
    labels: tuple[str, ...]
    unit: str


def load_examples(config: DataConfig, task: Task, processor: Any, label_ids: dict[str, int] | None = None) -> Examples:
    """The examples of a recipe.

    Args:
        config: where they are.
        task: what for.
        processor: the model's tokenizer or image processor.
        label_ids: the model's own numbers of labels, used if they name all labels of the data.

    Raises:
        ValueError: a column or all content is missing, or a label of the held-out data is unknown.
    """
    if task.name == "text-generation":
        train, held_out = (as_dataset(sequences) for sequences in load_sequences(config, processor))
        return Examples(train, held_out, default_data_collator, (), f"sequences of {config.sequence_length} tokens")
    train, held_out = _load_labelled(config, "text_column" if task.name == "text-classification" else "image_column")
    labels = _labels(config, train, held_out, label_ids or {})
    prepare = _prepare_texts if task.name == "text-classification" else _prepare_images
    train, held_out = (prepare(rows, config, processor, labels) for rows in (train, held_out))
    if task.name == "text-classification":
        return Examples(train, held_out, DataCollatorWithPadding(processor), labels, "texts")
    return Examples(train, held_out, default_data_collator, labels, "images")


def load_more_examples(config: DataConfig, task: Task, processor: Any, examples: Examples) -> Examples:
    """Examples from another source, of the same classes.

    Args:
        config: where they are.
        task: what for.
        processor: the model's tokenizer or image processor.
        examples: those of the first source.

    Raises:
        ValueError: as for `load_examples`, or there are other labels.
    """
    more = load_examples(config, task, processor, {label: i for i, label in enumerate(examples.labels)})
    if more.labels != examples.labels:
        raise HfDmsError(
            f"data.label_column: the labels are {', '.join(more.labels)}; the model has those of the first source, "
            f"{', '.join(examples.labels)}. Give data with these, or some of them."
        )
    return more


def load_sequences(config: DataConfig, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Packed token sequences to search on and to evaluate on.

    Args:
        config: where the text is.
        tokenizer: the model's.

    Returns:
        Two `[sequences, sequence_length]` int64 tensors.

    Raises:
        ValueError: no text, or not enough for one sequence.
    """
    train = _tokens(_load(config, config.path, config.split), config, tokenizer)
    if isinstance(config.held_out, str):
        held_out = _tokens(_load(config, *_held_out_source(config)), config, tokenizer)
    else:
        place = int(len(train) * (1 - config.held_out))
        train, held_out = train[:place], train[place:]
    return pack(train, config.sequence_length, "data.path"), pack(held_out, config.sequence_length, "data.held_out")


def pack(tokens: Tensor, sequence_length: int, source: str = "data") -> Tensor:
    """Cut a stream of tokens into sequences; what is left at the end is dropped.

    Raises:
        ValueError: there is not one whole sequence.
    """
    sequences = len(tokens) // sequence_length
    if sequences == 0:
        raise HfDmsError(
            f"{source} has {len(tokens)} tokens, less than one sequence of {sequence_length}. "
            "Give more text, or lower data.sequence_length."
        )
    return tokens[: sequences * sequence_length].view(sequences, sequence_length)


def as_dataset(sequences: Tensor) -> list[dict[str, Tensor]]:
    """Sequences as examples for a Trainer: the labels are the tokens themselves."""
    return [{"input_ids": row, "labels": row} for row in sequences]


# ---- texts and images with labels ------------------------------------------------------------------------------------
def _load_labelled(config: DataConfig, input_column: str) -> tuple[Any, Any]:
    """Rows to train on and rows held out, with their columns checked."""
    train = _load(config, config.path, config.split)
    _check_column(train, config, "label_column")
    if config.template is None or input_column != "text_column":
        _check_column(train, config, input_column)
    if isinstance(config.held_out, str):
        return train, _load(config, *_held_out_source(config))
    parts = train.train_test_split(test_size=config.held_out, seed=0)
    return parts["train"], parts["test"]


def _labels(config: DataConfig, train: Any, held_out: Any, label_ids: dict[str, int]) -> tuple[str, ...]:
    """Names of the classes, in the model's order if it knows them all, else in the data's."""
    feature = train.features[config.label_column]
    names = list(getattr(feature, "names", None) or sorted({str(value) for value in train[config.label_column]}))
    unknown = set(_label_names(held_out.features[config.label_column], held_out[config.label_column])) - set(names)
    if unknown:
        raise HfDmsError(
            f"data.held_out: label '{min(unknown)}' is not among those of data.path: {', '.join(names[:20])}."
        )
    return tuple(sorted(label_ids, key=lambda name: label_ids[name])) if set(names) <= set(label_ids) else tuple(names)


def _label_names(feature: Any, values: Any) -> list[str]:
    """Names of labels, which are in the feature of a column or the values themselves."""
    names = getattr(feature, "names", None)
    return [names[value] if names else str(value) for value in values]


def _prepare_texts(rows: Any, config: DataConfig, tokenizer: Any, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    ids = {name: i for i, name in enumerate(labels)}
    texts = [_text(value, tokenizer) for value in _texts(rows, config)]
    encoded = tokenizer(texts, truncation=True, max_length=config.sequence_length)
    numbers = [ids[name] for name in _label_names(rows.features[config.label_column], rows[config.label_column])]
    return [{key: encoded[key][i] for key in encoded} | {"labels": label} for i, label in enumerate(numbers)]


def _prepare_images(rows: Any, config: DataConfig, processor: Any, labels: tuple[str, ...]) -> Any:
    """A dataset that decodes and resizes its images when they are asked for."""
    ids = {name: i for i, name in enumerate(labels)}
    feature = rows.features[config.label_column]

    def prepare(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[config.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        numbers = [ids[name] for name in _label_names(feature, batch[config.label_column])]
        return {"pixel_values": list(pixels), "labels": numbers}

    return rows.with_transform(prepare)


# ---- what datasets does ----------------------------------------------------------------------------------------------
def _held_out_source(config: DataConfig) -> tuple[str, str]:
    """Path and split of the held-out data, if it is not a share."""
    held_out = str(config.held_out)
    is_path = Path(held_out).suffix in BUILDERS or Path(held_out).is_dir()
    return (held_out, "train") if is_path else (config.path, held_out)


def _check_column(dataset: Any, config: DataConfig, key: str) -> None:
    name = getattr(config, key)
    if name not in dataset.column_names:
        raise HfDmsError(f"data.{key}: the data has no column '{name}'. It has {', '.join(dataset.column_names)}.")


def _load(config: DataConfig, path: str, split: str) -> Any:
    import datasets

    if Path(path).is_dir():
        return datasets.load_dataset("imagefolder", data_dir=path, split=split)
    builder = BUILDERS.get(Path(path).suffix)
    if builder == "text":
        return datasets.load_dataset("text", data_files=path, split="train", sample_by="document")
    if builder is not None:
        return datasets.load_dataset(builder, data_files=path, split="train")
    return datasets.load_dataset(path, config.name, split=split)


def _tokens(dataset: Any, config: DataConfig, tokenizer: Any) -> Tensor:
    """All documents of a dataset as one stream of tokens, each followed by the end-of-text token."""
    documents = [_text(value, tokenizer) for value in _texts(dataset, config) if value]
    if not documents:
        raise HfDmsError(f"data.path: {config.path} has no text in column '{config.text_column}'.")
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    end: Sequence[int] = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return torch.tensor([token for document in encoded for token in (*document, *end)])


def _texts(dataset: Any, config: DataConfig) -> Any:
    """The text or the chat of every row."""
    if config.template is None:
        _check_column(dataset, config, "text_column")
        return dataset[config.text_column]
    try:
        return [config.template.format(**row) for row in dataset]
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise HfDmsError(
            f"data.template: {config.template!r} cannot be filled ({type(error).__name__}: {error}). The data has "
            f"columns {', '.join(dataset.column_names)}; write braces that are meant as such twice."
        ) from error


def _text(value: Any, tokenizer: Any) -> str:
    return value if isinstance(value, str) else tokenizer.apply_chat_template(value, tokenize=False)
