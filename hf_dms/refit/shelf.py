"""Storage for the data of each batch between two layers: in memory, or in files.

A walk through the layers needs the hidden state of every batch in front of the next layer. Nothing else grows with the
number of batches. For a long calibration text they can be kept in files, and one file is read at a time.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


class Shelf:
    """A list of objects that are mostly tensors, in memory or in a folder of files.

    Args:
        folder: a folder in which a folder for the files is made. The caller removes it. Default: memory.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self._items: list[Any] = []
        self._folder = None if folder is None else Path(tempfile.mkdtemp(dir=folder))

    def __len__(self) -> int:
        return len(self._items)

    def append(self, item: Any) -> None:
        self._items.append(None)
        self[len(self) - 1] = item

    def clear(self) -> None:
        """Remove all objects, and their files."""
        for place in range(len(self) if self._folder is not None else 0):
            self._file(place).unlink()
        self._items.clear()

    def __setitem__(self, place: int, item: Any) -> None:
        if self._folder is None:
            self._items[place] = item
        else:
            torch.save(item, self._file(place))

    def __getitem__(self, place: int) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        # The file was written by this process. It holds the arguments of a layer, which are not only tensors.
        return self._items[place] if self._folder is None else torch.load(self._file(place), weights_only=False)

    def _file(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{place}.pt"
