"""Data files of every kind, and tokenizers of one token per letter or word, for the tests of tasks."""

import csv
import json
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Value
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
LETTERS = {letter: i for i, letter in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", "?"])}


def letters(begins: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per letter: a is 3, b is 4, ...; blanks are no tokens.

    Args:
        begins: whether <s>, token 1, is put before each text.
        options: special tokens; the end of text is </s>, token 2, unless they say otherwise.
    """
    tokenizer = Tokenizer(models.WordLevel(LETTERS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"</?s>|."), "isolated")]
    )
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    options = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def write_rows(path: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None) -> str:
    """Write rows to a file in the format of its suffix, or to a folder as `Dataset.save_to_disk` does."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        dataset = Dataset.from_list(rows)
        for column, feature in (features or {}).items():
            dataset = dataset.cast_column(column, feature)
        dataset.to_parquet(path) if path.suffix == ".parquet" else dataset.save_to_disk(path)
    return str(path)


def texts_with_labels(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": "ab c", "label": label} for label in labels]


def as_class_label(labels: list[int], names: list[str], path: Path) -> str:
    """A parquet file whose labels are a `ClassLabel`."""
    rows = texts_with_labels([int(label) for label in labels])
    dataset = Dataset.from_list(rows).cast_column("label", Value("int64"))
    dataset.cast_column("label", ClassLabel(names=names)).to_parquet(path)
    return str(path)
