"""Freed memory is kept by the process and used again."""

import platform
import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")
SCRIPT = """
import resource, torch
from hf_dms.experiment.allocator import give_back_freed_memory_, keep_freed_memory_

class Cycle:
    def __init__(self):
        self.itself, self.tensor = self, torch.ones(64, 2**20)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def faults():
    for _ in range(12):  # the first freed blocks may be too small by a few bytes, and are joined later
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64, 2**20)  # 256 MiB, above what glibc takes from its heap by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory_()
print(faults())
Cycle()
held = resident()
give_back_freed_memory_()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_large_tensor_gets_the_pages_of_the_one_before_until_they_are_given_back():
    left, kept, given_back = (int(line) for line in subprocess.check_output([sys.executable, "-c", SCRIPT]).split())
    assert kept < 2**28 // resource.getpagesize() // 100
    assert kept < left // 5  # huge pages take fewer of them
    assert given_back > 0.9 * 2**28  # of the tensor that only a cycle holds


def test_other_c_libraries_are_left_alone(monkeypatch):
    from hf_dms.experiment import allocator

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("no mallopt there"))
    allocator.keep_freed_memory_()
    allocator.give_back_freed_memory_()


def test_a_setting_of_the_user_is_left_alone(monkeypatch):
    from hf_dms.experiment import allocator

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("the allocator was set"))
    allocator.keep_freed_memory_()
