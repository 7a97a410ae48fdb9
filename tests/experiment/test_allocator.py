"""Freed memory is kept by the process and used again."""

import platform
import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")
SCRIPT = """
import resource, sys, torch
from hf_dms.experiment.allocator import keep_freed_memory_
if sys.argv[1] == "keep":
    keep_freed_memory_()
pages = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64, 2**20)  # 256 MiB, above what glibc takes from its heap by itself
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(pages[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_large_tensor_gets_the_pages_of_the_one_before():
    faults = {how: int(subprocess.check_output([sys.executable, "-c", SCRIPT, how])) for how in ("keep", "leave")}
    pages = 2**28 // resource.getpagesize()
    assert faults["keep"] < pages // 100
    assert faults["keep"] < faults["leave"] // 5  # huge pages take fewer of them


def test_other_c_libraries_are_left_alone(monkeypatch):
    from hf_dms.experiment import allocator

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("no mallopt there"))
    allocator.keep_freed_memory_()
