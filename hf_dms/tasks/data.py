"""The `data` section of a recipe: where examples are, and which part of a row is the input and which the label."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HfDmsError

BUILDERS = {  # the packaged readers of `datasets`, by the suffix of a file
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
OWN = "self"  # in place of a path: what the dense model writes itself, own_texts.py
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def suffix_of(path: str | Path) -> str:
    """The suffix that says how a file is read: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def is_data_file(path: str | Path) -> bool:
    """Whether a path is named like a file of a kind that can be read, whether it is there or not."""
    return suffix_of(path) in BUILDERS


@dataclass
class DataConfig:
    """The `data` section of a recipe."""

    path: str = field(  # type: ignore[assignment]  # None is refused below
        default=None,
        metadata={
            "help": "A file (txt, jsonl, json, parquet, csv, tsv, also compressed), a folder of such files, a folder "
            "of images with a subfolder per label, a folder that `Dataset.save_to_disk` wrote, or the Hub id of a "
            "dataset. Text is UTF-8. Required."
        },
    )
    name: str | None = field(default=None, metadata={"help": "Name of the configuration of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split to search on."})
    text_column: str = field(
        default="text", metadata={"help": "Column with the text, or with chat messages (the chat template is applied)."}
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Text of a row in place of text_column, its columns in braces: 'Q: {question} A: {answer}'. A cell "
            "without a value (null) is an empty text."
        },
    )
    image_column: str = field(
        default="image", metadata={"help": "Column with the image, for image-classification and object-detection."}
    )
    label_column: str = field(
        default="label",
        metadata={
            "help": "Column with the label: the name of a class (case does not matter), or its number. A trained head "
            "keeps its classes; a new head gets those of the data."
        },
    )
    objects_column: str = field(
        default="objects",
        metadata={
            "help": "Column with the objects of an image, for object-detection: {bbox: [[x, y, width, height], ...] in "
            "pixels, category: [label, ...]}; a category is what a label is."
        },
    )
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

    mix: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Further text to search, repair and train on, {path: weight}: how many of its sequences come for "
            "each one of `path`. Its column is `text`. The path self, here or as `path`, is what the dense model "
            "writes itself: with it a narrow text does not ruin the model outside. For text-generation."
        },
    )
    own_sequences: int = field(
        default=128,
        metadata={"help": "How many sequences the dense model writes for the path self; they are kept in a cache."},
    )

    def __post_init__(self) -> None:
        if self.own_sequences < 1:
            raise HfDmsError(f"data.own_sequences must be at least 1, got {self.own_sequences}.")
        for path, weight in self.mix.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise HfDmsError(
                    f"data.mix.{path} must be a weight above 0, got {weight!r}. 1 mixes as much of it as of data.path."
                )
            if path == self.path:
                raise HfDmsError(f"data.mix.{path} is data.path itself, whose weight is 1. Weigh the others by it.")
        if self.path is None:
            raise HfDmsError(
                "data.path is required: a txt, jsonl, parquet or csv file, a folder of images, or the Hub id of a "
                "dataset."
            )
        self.held_out = _number_if_it_is_one(self.held_out)
        if isinstance(self.held_out, int | float) and not 0 < self.held_out < 1:
            raise HfDmsError(f"data.held_out must be a share in (0, 1), a file or a split, got {self.held_out}.")
        if self.sequence_length < 2:
            raise HfDmsError(f"data.sequence_length must be at least 2, got {self.sequence_length}.")
        if self.path == OWN and not isinstance(self.held_out, str):
            raise HfDmsError(
                f"data.held_out must be a file, a folder or a dataset if data.path is {OWN}, got {self.held_out}: what "
                "a model writes itself is no measure of it."
            )
        files = {"path": self.path, "held_out": self.held_out} | {f"mix.{path}": path for path in self.mix}
        for key, value in files.items():
            if isinstance(value, str) and is_data_file(value) and not Path(value).exists():
                raise HfDmsError(f"data.{key}: there is no file '{value}' (looked in {Path.cwd()}).")

    @property
    def uses_own_texts(self) -> bool:
        """Whether a source is what the dense model writes itself."""
        return OWN in (self.path, *self.mix)

    def with_own_texts(self, path: str) -> DataConfig:
        """The same with a file in place of `self`."""
        mix = {path if source == OWN else source: weight for source, weight in self.mix.items()}
        return dataclasses.replace(self, path=path if self.path == OWN else self.path, mix=mix)

    def without_own_texts(self) -> DataConfig:
        """What can be read before the dense model has written anything: the held-out text in place of `self`."""
        mix = {source: weight for source, weight in self.mix.items() if source != OWN}
        return dataclasses.replace(self, path=str(self.held_out) if self.path == OWN else self.path, mix=mix)


def _number_if_it_is_one(held_out: str | float) -> str | float:
    """A share that YAML took for text, such as `1e-2`, as a number."""
    try:
        return float(held_out) if isinstance(held_out, str) else held_out
    except ValueError:
        return held_out
