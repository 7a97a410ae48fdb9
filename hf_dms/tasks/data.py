"""The `data` section of a recipe: the source of the examples, and the columns of inputs and labels."""

from __future__ import annotations

import dataclasses
import os
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
OWN = "self"  # in place of a path: texts that the dense model writes (own_texts.py)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def suffix_of(path: str | Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `a.jsonl` and for `a.jsonl.gz`."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def is_data_file(path: str | Path) -> bool:
    """Whether a path has the name of a file that can be read. The file need not exist."""
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
            "help": "Format of the text of a row, in place of text_column, with columns in braces: "
            "'Q: {question} A: {answer}'. A cell without a value (null) becomes an empty text."
        },
    )
    image_column: str = field(
        default="image", metadata={"help": "Column with the image, for image-classification and object-detection."}
    )
    label_column: str = field(
        default="label",
        metadata={
            "help": "Column with the label: the name of a class (in any case), or its number. A trained head "
            "keeps its classes; a new head gets those of the data."
        },
    )
    objects_column: str = field(
        default="objects",
        metadata={
            "help": "Column with the objects of an image, for object-detection: {bbox: [[x, y, width, height], ...] in "
            "pixels, category: [label, ...]}; each category is a label as in label_column."
        },
    )
    sequence_length: int = field(
        default=512,
        metadata={
            "help": "Tokens per sequence. Documents are packed, with an end-of-text token between them. For "
            "text-classification: texts are truncated to this many tokens."
        },
    )
    held_out: str | float = field(
        default=0.05,
        metadata={
            "help": "Data to evaluate on: a file like `path`, the name of another split, or a share of the data."
        },
    )

    mix: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Further texts to search, repair and train on, {path: weight}. The weight is the number of their "
            "sequences per sequence of `path`. Their column is `text`. The path self, here or as `path`, stands for "
            "texts that the dense model writes; with them, calibration on a narrow text does not ruin the model for "
            "others. Only for text-generation."
        },
    )
    own_sequences: int = field(
        default=128,
        metadata={"help": "Number of sequences that the dense model writes for the path self. They are cached."},
    )

    def __post_init__(self) -> None:
        if self.own_sequences < 1:
            raise HfDmsError(f"data.own_sequences must be at least 1, got {self.own_sequences}.")
        for path, weight in self.mix.items():
            if not isinstance(path, str):
                raise HfDmsError(f"data.mix must be a section with a path per weight, got {path!r} as a path.")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise HfDmsError(
                    f"data.mix.{path} must be a weight above 0, got {weight!r}. With 1, there is as much of it as of "
                    "data.path."
                )
            if path == self.path:
                raise HfDmsError(f"data.mix.{path} is data.path itself, whose weight is 1. Weigh the others by it.")
        if not self.path:
            raise HfDmsError(
                "data.path is required: a txt, jsonl, parquet or csv file, a folder of images, or the Hub id of a "
                "dataset."
            )
        self.path = os.path.expanduser(self.path)
        self.mix = {os.path.expanduser(path): weight for path, weight in self.mix.items()}
        self.held_out = _number_if_it_is_one(self.held_out)
        if isinstance(self.held_out, str):
            self.held_out = os.path.expanduser(self.held_out)
        if isinstance(self.held_out, int | float) and not 0 < self.held_out < 1:
            raise HfDmsError(f"data.held_out must be a share in (0, 1), a file or a split, got {self.held_out}.")
        if self.sequence_length < 2:
            raise HfDmsError(f"data.sequence_length must be at least 2, got {self.sequence_length}.")
        if self.path == OWN and not isinstance(self.held_out, str):
            raise HfDmsError(
                f"data.held_out must be a file, a folder or a dataset if data.path is {OWN}, got {self.held_out}: a "
                "model cannot be measured on its own texts."
            )
        files = {"path": self.path, "held_out": self.held_out} | {f"mix.{path}": path for path in self.mix}
        for key, value in files.items():
            # Any other name that does not exist may be a dataset on the Hub, or a split.
            if isinstance(value, str) and is_data_file(value) and not Path(value).exists():
                raise HfDmsError(f"data.{key}: there is no file '{value}' (looked in {Path.cwd()}).")

    @property
    def uses_own_texts(self) -> bool:
        """Whether one of the sources is the dense model's own texts."""
        return OWN in (self.path, *self.mix)

    def with_own_texts(self, path: str) -> DataConfig:
        """A copy with a file in place of `self`."""
        mix = {path if source == OWN else source: weight for source, weight in self.mix.items()}
        return dataclasses.replace(self, path=path if self.path == OWN else self.path, mix=mix)

    def without_own_texts(self) -> DataConfig:
        """A copy that can be read before the dense model has written its texts: without `self`.

        If `self` is the path, the held-out text takes its place for now.
        """
        mix = {source: weight for source, weight in self.mix.items() if source != OWN}
        return dataclasses.replace(self, path=str(self.held_out) if self.path == OWN else self.path, mix=mix)


def _number_if_it_is_one(held_out: str | float) -> str | float:
    """The value as a number if it is one: YAML reads `1e-2` as text."""
    try:
        return float(held_out) if isinstance(held_out, str) else held_out
    except ValueError:
        return held_out
