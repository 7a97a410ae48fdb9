"""Folders that are written completely or not at all, by one process at a time."""

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
    """Context: a temporary folder that becomes `folder` if the block succeeds, and is removed if it fails.

    Args:
        folder: the final folder.
        overwrite: whether it may exist, and is then replaced.
        sources: files and folders that the result is made from, see `check_place`.

    Raises:
        ValueError: `check_writable` refuses the folder, or another process writes it.
    """
    target = Path(folder)
    check_writable(target, overwrite, sources)
    # Beside the target, because a rename is one step only within a file system.
    temporary = target.with_name(f".{target.name}.writing")
    # The lock comes first: another process's temporary folder has the same name.
    with only_writer(target):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        temporary.mkdir()
        try:
            yield temporary
            replace_folder(target, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Context: no other process may write to a folder. If this process is killed, the system releases the lock.

    Raises:
        ValueError: another process writes to it, or no folder can be made there.
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
        # Before the release: after it, the file may be the lock of another process.
        with suppress(OSError):  # Windows does not remove a file that is open
            os.remove(lock.lock_file)
        lock.release()


def replace_folder(folder: Path, new: Path | None = None) -> None:
    """Replace a folder, or remove it if there is no new one. Even if killed, no half-written folder has its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # left by a run that was killed
    if folder.exists():
        # Renaming is one step for the system, deleting a tree is many. At any moment the name holds the old folder, the
        # new one, or nothing.
        folder.rename(removed)
    if new is not None:
        new.rename(folder)
    shutil.rmtree(removed, ignore_errors=True)


def check_writable(folder: str | os.PathLike, overwrite: bool, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Check that a result may be written to a folder.

    Args:
        folder: folder of the result.
        overwrite: whether it may be replaced.
        sources: files and folders that the result is made from, see `check_place`.

    Raises:
        ValueError: it exists, is not empty, and `overwrite` is not set; or `check_place` refuses it.
    """
    check_place(folder, sources)
    target = Path(folder)
    if target.is_file():
        raise HfDmsError(f"{target} is a file. Choose another output.path.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise HfDmsError(f"{target} exists and is not empty. Choose another output.path or set output.overwrite: true.")


def check_place(folder: str | os.PathLike, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Check that the folder of a result can be made, and that it would not replace anything the result is made from.

    Args:
        folder: folder of the result.
        sources: files and folders that the result is made from. Paths that do not exist (a Hub id) do not count.

    Raises:
        ValueError: the folder is a source, or contains one; or no folder can be made there.
    """
    target = Path(folder).absolute()
    for source in map(Path, sources):
        if source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
            where = "is" if target.resolve() == source.resolve() else "holds"
            raise HfDmsError(f"output.path: {replaces(folder, where, source)}")
    existing = next(parent for parent in target.parents if parent.exists())
    try:
        # Tried, not asked: permissions say little about read-only disks, quotas and network folders.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise HfDmsError(
            f"output.path: no folder can be made in {existing} ({error.strerror}). Choose another one."
        ) from error
