"""How much memory least squares take. It follows from a model's sizes, so it is known before the weights are loaded.

- Repair holds one map's sums at a time: AᵀDA `[inputs, inputs]` and AᵀDR `[inputs, outputs]` in float64. There is one
  copy for each part of the batches (they are split to choose the ridge), and two more while the map is solved. Repair
  also keeps the hidden states of all batches, for both models, and the targets of one layer. `offload` moves these to
  files.
- A search over refitted weights keeps, for every map that reads a pruned dim, in float32: a Cholesky factor
  `[inputs, inputs]`, the solved right-hand side `[inputs, outputs]` and the weights at two widths; and in float64 a
  factor of the outputs' curvature, `[outputs, outputs]`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..archs.bind import BoundSpec
from .least_squares import HELD_OUT
from .readers import stream_readers
from .stream import stream_dim

DOUBLE, SINGLE = 8, 4  # bytes


def repair_bytes(
    bound: BoundSpec, positions: int, itemsize: int, dims: frozenset[str] = frozenset()
) -> tuple[int, int]:
    """Bytes that a repair takes beside both models, for a model with one stack: (sums, hidden states).

    Where the stream is cut, it is the most that they may take: which maps have the same inputs is not known here.

    Args:
        bound: the dense model's architecture.
        positions: tokens of all examples together.
        itemsize: bytes per number of a hidden state.
        dims: the pruned dims.
    """
    stream = stream_dim(bound)
    maps = [(inputs, outputs) for layer, _, inputs, outputs in _maps(bound) if layer == 0]
    states = 2 + len(maps)  # both models' and the targets
    if stream in dims:  # the maps that read it, side by side, and the dense states in front of the layer (readers.py)
        readers = stream_readers(bound, bound.depth, 0)
        maps.append((bound.sizes[stream], sum(bound.product(axes[0]) for axes in readers.values())))
        states += 1
    # + 1 for a bias, which counts as an input. The largest map decides, since one is solved at a time.
    sums = max((inputs + 1) * (inputs + 1 + outputs) for inputs, outputs in maps)
    # Each part, their sum, and what is solved from it.
    return DOUBLE * (HELD_OUT + 2) * sums, itemsize * states * positions * bound.sizes[stream]


def refitted_bytes(bound: BoundSpec, dims: frozenset[str]) -> int:
    """Bytes that a search over refitted weights keeps beside the model.

    Args:
        bound: the dense model's architecture.
        dims: the pruned dims.
    """
    return sum(
        SINGLE * (inputs * inputs + 3 * inputs * outputs) + DOUBLE * outputs * outputs
        for _, axis, inputs, outputs in _maps(bound)
        if dims & {*axis}
    )


def _maps(bound: BoundSpec) -> Iterator[tuple[int, tuple[str, ...], int, int]]:
    """Linear maps that write into the stream: (layer, dims of the inputs, number of inputs, number of outputs)."""
    stream = (stream_dim(bound),)
    for name, param in bound.params.items():
        if name.endswith(".weight") and param.layer is not None and len(param.axes) == 2 and param.axes[0] == stream:
            yield param.layer, param.axes[1], bound.product(param.axes[1]), bound.product(stream)
