"""Whether bfloat16 is worth its loss of precision on this CPU: one without instructions for it emulates them."""

from __future__ import annotations

import time

import torch

SIZE = 256  # of the square matrices whose product is timed
SLOW = 3  # times float32: beyond noise; a CPU without bfloat16 was seen at 60


def slowdown_of_bfloat16() -> float:
    """How many times as long as in float32 a product of two matrices takes in bfloat16 on the CPU: best of three."""
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    left @ right  # the first call prepares
    times = []
    for _ in range(3):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return min(times)


def slow_bfloat16(asked_by: list[str]) -> str:
    """What to tell a user who computes in bfloat16 on a CPU; empty if it is not slow, or nothing asks for it.

    A training computes in float32 then; the model's own dtype is left as the user says.

    Args:
        asked_by: keys of a recipe that ask for it.
    """
    if not asked_by or (times := slowdown_of_bfloat16()) < SLOW:
        return ""
    ways = ["say model.dtype: float32" if key == "model.dtype" else f"{key} counts as false" for key in asked_by]
    return (
        f"bfloat16 is {times:.0f} times slower than float32 on this CPU (a product of {SIZE} x {SIZE} matrices): "
        f"{', and '.join(ways)}."
    )
