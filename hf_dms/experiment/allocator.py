"""Keep freed memory in the process: a step on a CPU spends no time on getting pages again, and the peak is higher.

The C library returns every freed tensor above 32 MB to the system (a language model's logits among them), and the
system clears each page of the next one. A command that trains or measures for minutes keeps its memory instead.
benchmarks/kept_memory.py measures what that saves and what it costs.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # names of M_MMAP_MAX and M_TRIM_THRESHOLD in malloc.h
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory_() -> None:
    """Tell glibc to serve large blocks from the heap and never to return any. Without glibc it does nothing.

    Memory stays in the process until it ends. A freed block that is too small for the next one by a few bytes is not
    taken, so the peak can be several of the largest tensors above that of what is in use. Where that is too much, set
    one of glibc's own variables, such as MALLOC_TRIM_THRESHOLD_=131072: then everything is left as it is.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in VARIABLES):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # -1 as an unsigned number is the largest threshold


def give_back_freed_memory_() -> None:
    """Free what only reference cycles hold, such as a Trainer and its model, and return free pages to the system.

    Resident memory then is what is in use, also after `keep_freed_memory_`.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
