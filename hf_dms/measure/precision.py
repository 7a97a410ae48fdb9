"""Whether bfloat16 is slow on this CPU. CPUs without bfloat16 instructions emulate them."""

from __future__ import annotations

import time

import torch

SIZE = 256  # rows and columns of the matrices in the timed product
SLOW = 3  # times as slow as float32, well beyond noise; a CPU without bfloat16 was 60 times as slow


def slowdown_of_bfloat16() -> float:
    """Time of a matrix product in bfloat16, divided by the time in float32, on the CPU; best of three."""
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    left @ right  # the first call prepares
    times = []
    for _ in range(3):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    # The fastest of three: other work on the machine can only slow a run down.
    return min(times)


def slow_bfloat16(asked_by: list[str]) -> str:
    """A warning for a user who computes in bfloat16 on a CPU where that is slow; empty otherwise.

    Training then computes in float32. The model's own dtype does not change.

    Args:
        asked_by: keys of a recipe that ask for bfloat16.
    """
    if not asked_by or (times := slowdown_of_bfloat16()) < SLOW:
        return ""
    weights = "the weights stay in bfloat16 unless you write model.dtype: float32"
    ways = [weights if key == "model.dtype" else f"{key} counts as false" for key in asked_by]
    return (
        f"bfloat16 is {times:.0f} times slower than float32 on this CPU (a product of {SIZE} x {SIZE} matrices): "
        f"{', and '.join(ways)}."
    )
