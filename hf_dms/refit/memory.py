"""How much memory least squares take, from a model's sizes alone, so that it is known before the weights are loaded.

- Repair holds one map's sums at a time: AᵀDA `[inputs, inputs]` and AᵀDR `[inputs, outputs]` in float64, once for each
  of the parts that the ridge is chosen on, and once more while it is solved. Beside them wait the hidden states of all
  batches, of both models, and one layer's targets, one for each of its maps. `offload` keeps these in files.
- A search over refitted weights keeps for every map that a pruned dim leads to a Cholesky factor n², the solved
  n·outputs and two levels of weights, in float32, and a float64 factor of the outputs' curvature, `[outputs, outputs]`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..archs.bind import BoundSpec
from .repair import HELD_OUT
from .stream import stream_dim

DOUBLE, SINGLE = 8, 4  # bytes


def repair_bytes(bound: BoundSpec, positions: int, itemsize: int) -> tuple[int, int]:
    """What a repair of a model of one stack takes beside both models: (sums, hidden states).

    Args:
        bound: the dense model's architecture.
        positions: tokens of all examples together.
        itemsize: bytes of a number of a hidden state.
    """
    maps = [(inputs, outputs) for layer, _, inputs, outputs in _maps(bound) if layer == 0]
    sums = max((inputs + 1) * (inputs + 1 + outputs) for inputs, outputs in maps)
    states = 2 + len(maps)  # both models' and the targets
    return DOUBLE * (HELD_OUT + 2) * sums, itemsize * states * positions * bound.sizes[stream_dim(bound)]


def refitted_bytes(bound: BoundSpec, dims: frozenset[str]) -> int:
    """What a search over the refitted weights of some dims keeps beside the model.

    Args:
        bound: the dense model's architecture.
        dims: which are pruned.
    """
    return sum(
        SINGLE * (inputs * inputs + 3 * inputs * outputs) + DOUBLE * outputs * outputs
        for _, axis, inputs, outputs in _maps(bound)
        if dims & {*axis}
    )


def _maps(bound: BoundSpec) -> Iterator[tuple[int, tuple[str, ...], int, int]]:
    """Linear maps that write into the stream: layer, dims of the inputs, inputs, outputs."""
    stream = (stream_dim(bound),)
    for name, param in bound.params.items():
        if name.endswith(".weight") and param.layer is not None and len(param.axes) == 2 and param.axes[0] == stream:
            yield param.layer, param.axes[1], bound.product(param.axes[1]), bound.product(stream)
