"""Text for a search and for its evaluation: `datasets` loads it, the model's tokenizer packs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataConfig:
    """The `data` section of a recipe."""

    path: str = field(
        default=None, metadata={"help": "A file (txt, jsonl, json, parquet, csv) or the Hub id of a dataset. Required."}
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split to search on."})
    text_column: str = field(
        default="text", metadata={"help": "Column with the text, or with chat messages (the chat template is applied)."}
    )
    sequence_length: int = field(
        default=512, metadata={"help": "Tokens per sequence; documents are packed, an end-of-text token between them."}
    )
    held_out: str | float = field(
        default=0.05,
        metadata={"help": "What to evaluate on: a file like `path`, another split's name, or a share of the data."},
    )

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("data.path is required: a txt, jsonl, parquet or csv file, or the Hub id of a dataset.")
        if isinstance(self.held_out, int | float) and not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must be a share in (0, 1), a file or a split, got {self.held_out}.")
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length must be at least 2, got {self.sequence_length}.")
        for key in ("path", "held_out"):
            value = getattr(self, key)
            if isinstance(value, str) and Path(value).suffix in BUILDERS and not Path(value).is_file():
                raise ValueError(f"data.{key}: there is no file '{value}' (looked in {Path.cwd()}).")


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
        is_file = Path(config.held_out).suffix in BUILDERS
        source = (config.held_out, "train") if is_file else (config.path, config.held_out)
        held_out = _tokens(_load(config, *source), config, tokenizer)
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
        raise ValueError(
            f"{source} has {len(tokens)} tokens, less than one sequence of {sequence_length}. "
            "Give more text, or lower data.sequence_length."
        )
    return tokens[: sequences * sequence_length].view(sequences, sequence_length)


def as_dataset(sequences: Tensor) -> list[dict[str, Tensor]]:
    """Sequences as examples for a Trainer: the labels are the tokens themselves."""
    return [{"input_ids": row, "labels": row} for row in sequences]


def _load(config: DataConfig, path: str, split: str) -> Any:
    import datasets

    builder = BUILDERS.get(Path(path).suffix)
    if builder == "text":
        return datasets.load_dataset("text", data_files=path, split="train", sample_by="document")
    if builder is not None:
        return datasets.load_dataset(builder, data_files=path, split="train")
    return datasets.load_dataset(path, config.name, split=split)


def _tokens(dataset: Any, config: DataConfig, tokenizer: Any) -> Tensor:
    """All documents of a dataset as one stream of tokens, each followed by the end-of-text token."""
    if config.text_column not in dataset.column_names:
        raise ValueError(
            f"data.text_column: the data has no column '{config.text_column}'. It has "
            f"{', '.join(dataset.column_names)}."
        )
    documents = [_text(value, tokenizer) for value in dataset[config.text_column] if value]
    if not documents:
        raise ValueError(f"data.path: {config.path} has no text in column '{config.text_column}'.")
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    end: Sequence[int] = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return torch.tensor([token for document in encoded for token in (*document, *end)])


def _text(value: Any, tokenizer: Any) -> str:
    return value if isinstance(value, str) else tokenizer.apply_chat_template(value, tokenize=False)
