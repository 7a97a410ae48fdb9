"""Folders that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import HfDmsError
from ..files import replaces


@contextmanager
def new_folder(
    folder: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and is gone when it does not.

    Raises:
        ValueError: it may not be written, see `check_writable`; another process writes it.
    """
    target = Path(folder)
    check_writable(target, overwrite, sources)
    temporary = target.with_name(f".{target.name}.writing")
    with only_writer(target):
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir()
        try:
            yield temporary
            replace_folder(target, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes from writing to a folder for a while; where a process is killed, the system lets go for it.

    Raises:
        ValueError: another one writes it, or no folder can be made there.
    """
    target = Path(folder)
    check_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HfDmsError(
            f"{target} is being written by another process. Wait until it has ended, or choose another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does it by itself when it is free
            os.remove(lock.lock_file)
        lock.release()


def replace_folder(folder: Path, new: Path | None = None) -> None:
    """Remove a folder, if it is there, and give its name to another one: a kill leaves no part of it under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # what an earlier kill left
    if folder.exists():
        folder.rename(removed)
    if new is not None:
        new.rename(folder)
    shutil.rmtree(removed, ignore_errors=True)


def check_writable(folder: str | os.PathLike, overwrite: bool, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Check that a result may be written to a folder.

    Args:
        folder: the one.
        overwrite: whether it may be replaced.
        sources: what the result is made from, see `check_place`.

    Raises:
        ValueError: it exists and is not an empty folder, and `overwrite` is not set; or see `check_place`.
    """
    check_place(folder, sources)
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise HfDmsError(f"{target} exists and is not empty. Choose another output.path or set output.overwrite: true.")


def check_place(folder: str | os.PathLike, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Check that a folder can be made where a result is to be, and that nothing it is made from would go.

    Args:
        folder: of the result.
        sources: files and folders that the result is made from; what does not exist (a Hub id) does not count.

    Raises:
        ValueError: the folder is a source, or one is in it; no folder can be made there.
    """
    target = Path(folder).absolute()
    for source in map(Path, sources):
        if source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
            where = "is" if target.resolve() == source.resolve() else "holds"
            raise HfDmsError(f"output.path: {replaces(folder, where, source)}")
    existing = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise HfDmsError(
            f"output.path: no folder can be made in {existing} ({error.strerror}). Choose another one."
        ) from error
