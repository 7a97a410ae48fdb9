"""Rows of a recipe's data, read by `datasets`. Data that cannot be read ends in one error that names the file.

This file does not know what the rows mean. It only checks that there are rows, and that they have the needed columns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import HfDmsError
from .data import BUILDERS, DataConfig, is_data_file, suffix_of

OPTIONS: dict[str, dict[str, Any]] = {  # options of the readers: a text file is one document, a cell "NA" is text
    ".txt": {"sample_by": "document", "encoding": "utf-8-sig"},
    ".csv": {"keep_default_na": False},
    ".tsv": {"keep_default_na": False, "sep": "\t"},
}
IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Source:
    """Rows with their origin.

    Attributes:
        rows: a `datasets.Dataset` with at least one row.
        key: key of the recipe that names them, data.path or data.held_out.
        path: a file, a folder or a Hub id.
        has_own_numbers: whether the author of the data numbered the labels. False for a folder of images, where the
            numbers are only the order of the subfolders.
    """

    rows: Any
    key: str
    path: str
    has_own_numbers: bool = True

    def cell(self, row: int, column: str) -> str:
        """A cell in words, for errors. Rows count from 1."""
        return f"{self.key}: row {row + 1} of {self.path}, column '{column}',"

    def check_column(self, config: DataConfig, option: str) -> None:
        """Check that the rows have the column that an option of the config names.

        Raises:
            HfDmsError: they do not.
        """
        name = getattr(config, option)
        if name not in self.rows.column_names:
            has = f"It has {', '.join(self.rows.column_names)}."
            if self.key == "data.path":
                raise HfDmsError(f"data.{option}: the data has no column '{name}'. {has}")
            raise HfDmsError(f"{self.key}: {self.path} has no column '{name}' (data.{option}). {has}")


def load_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """Rows to train on, and held-out rows; None if these are a share of the first.

    Raises:
        HfDmsError: a source cannot be read, or has no rows.
    """
    train = _load(config, config.path, config.split, "data.path")
    if not isinstance(config.held_out, str):
        return train, None
    path, split = _held_out_place(config, config.held_out)
    same = (path, split) == (config.path, config.split)
    return train, train if same else _load(config, path, split, "data.held_out")


def _held_out_place(config: DataConfig, held_out: str) -> tuple[str, str]:
    """Path and split of the held-out data, if it is not a share."""
    if held_out == config.path:
        return config.path, config.split
    # The name of a split has no slash, so such a path that does not exist may be a dataset on the Hub.
    is_path = is_data_file(held_out) or Path(held_out).is_dir() or "/" in held_out
    return (held_out, "train") if is_path else (config.path, held_out)


def _load(config: DataConfig, path: str, split: str, key: str) -> Source:
    has_own_numbers = True
    with _one_error(path, key):
        if Path(path).is_dir():
            rows, has_own_numbers = _load_folder(config, Path(path), split, key)
        elif is_data_file(path):
            rows = _load_files([path], split, key)
        elif Path(path).exists():
            raise HfDmsError(f"{key}: {path} is not a kind of file that can be read. Known are {', '.join(BUILDERS)}.")
        else:
            rows = _datasets().load_dataset(path, config.name, split=split)
    if not len(rows):
        raise HfDmsError(f"{key}: {path} holds no rows. Give data with rows.")
    return Source(rows, key, path, has_own_numbers)


def _load_folder(config: DataConfig, folder: Path, split: str, key: str) -> tuple[Any, bool]:
    """Rows of a folder, and whether the author of the data numbered its labels."""
    datasets = _datasets()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # Dataset.save_to_disk
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            if split not in ("train", str(saved.split)):
                _refuse_split(folder, split, key)
            return saved, True
        if split not in saved:
            raise HfDmsError(f"data.split: {folder} has no split '{split}'. It has {', '.join(saved)}.")
        return saved[split], True
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if any(file.suffix.lower() in IMAGES for file in files):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), split=split), False
    # A folder of data often has a json file of information beside it.
    readable = [file for file in files if is_data_file(file) and file.suffix != ".json"] or [
        file for file in files if is_data_file(file)
    ]
    if not readable:
        raise HfDmsError(f"{key}: the folder {folder} holds neither images nor {', '.join(BUILDERS)} files.")
    if len(kinds := sorted({suffix_of(file) for file in readable})) > 1:
        raise HfDmsError(
            f"{key}: the folder {folder} holds files of several kinds, {', '.join(kinds)}, and `datasets` would read "
            "one of them only. Name one file, or give a folder of one kind."
        )
    options = OPTIONS.get(kinds[0], {})
    try:
        # By the folder and not by its files, because `datasets` takes files named like splits as splits.
        rows = datasets.load_dataset(str(folder.absolute()), config.name, split=split, **options)
        rows.data.validate(full=True)
        return rows, True
    except Exception:
        for file in readable:
            with _one_error(str(file), key):
                _load_files([str(file)], "train", key)  # to find the broken file and name it
        raise


def _load_files(files: list[str], split: str, key: str) -> Any:
    suffix = suffix_of(files[0])
    load = functools.partial(_datasets().load_dataset, BUILDERS[suffix], data_files=files, **OPTIONS.get(suffix, {}))
    rows = load(split="train")
    rows.data.validate(full=True)  # because the JSON reader accepts files in other encodings
    if split == "train":
        return rows
    try:
        return load(split=split)  # a part, such as train[:90%]
    except ValueError:
        _refuse_split(files[0], split, key)


def _refuse_split(path: str | Path, split: str, key: str) -> NoReturn:
    """Raise the error for a file, or a saved dataset, without this split: all of its rows would be taken instead."""
    if key == "data.held_out":
        raise HfDmsError(
            f"data.held_out: {path} has no split '{split}'. Give a file, a folder, a dataset, or a share such as 0.05."
        )
    raise HfDmsError(f"data.split: {path} has no split '{split}'. Leave data.split out, or name a part: train[:90%].")


@contextlib.contextmanager
def _one_error(path: str, key: str) -> Iterator[None]:
    """Turn whatever a reader raises into one error that names the file. The log of `datasets` is off meanwhile."""
    logging = _datasets().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except HfDmsError:
        raise
    except Exception as error:  # the readers raise errors of many kinds: pandas', pyarrow's, decoders', StopIteration
        # `datasets` wraps a reader's error in another one that does not name the cause.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise HfDmsError(f"{key}: {_what_is_wrong(path, cause)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _what_is_wrong(path: str, cause: BaseException) -> str:
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return f"{path} is empty."
    if isinstance(cause, UnicodeDecodeError) or "Invalid UTF8" in str(cause):
        return f"{path} is not UTF-8 ({cause}). Save it as UTF-8, such as by iconv -f latin1 -t utf-8."
    if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):
        return f"{path} holds no rows."
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    where = f"{path} cannot be read as {BUILDERS[suffix_of(path)]}" if is_data_file(path) else f"cannot read '{path}'"
    return f"{where} ({reason})."


def _datasets() -> Any:
    """`datasets`, imported when data is read: `import hf_dms` does not wait for it."""
    import datasets

    return datasets
