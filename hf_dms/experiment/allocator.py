"""Keep freed memory in the process. Without this, a sixth of a search step on a CPU went into getting pages again.

The C library returns every freed tensor above 32 MB to the system (a language model's logits among them), and the
system clears each page of the next one. A command that trains or measures for minutes keeps its memory instead.
"""

from __future__ import annotations

import ctypes
import platform

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # names of M_MMAP_MAX and M_TRIM_THRESHOLD in malloc.h


def keep_freed_memory_() -> None:
    """Tell glibc to serve large blocks from the heap and never to return any. Without glibc it does nothing.

    Memory grows to the peak of what is in use, as before, and stays there until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # -1 as an unsigned number is the largest threshold
