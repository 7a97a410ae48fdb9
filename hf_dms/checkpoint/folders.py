"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import HfDmsError


@contextmanager
def new_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and is gone when it does not.

    Raises:
        ValueError: `folder` exists and is not an empty folder, and `overwrite` is not set.
    """
    target = Path(folder)
    check_writable(target, overwrite)
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(folder: Path, new: Path | None = None) -> None:
    """Remove a folder, if it is there, and give its name to another one: a kill leaves no part of it under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # what an earlier kill left
    if folder.exists():
        folder.rename(removed)
    if new is not None:
        new.rename(folder)
    shutil.rmtree(removed, ignore_errors=True)


def check_writable(folder: str | os.PathLike, overwrite: bool) -> None:
    """Check that a result may be written to a folder.

    Raises:
        ValueError: it exists and is not an empty folder, and `overwrite` is not set.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise HfDmsError(f"{target} exists and is not empty. Choose another output.path or set output.overwrite: true.")
