"""The scales of units go into the weights that read them.

With `dms.scales`, after DDP (Huang et al., arXiv 2603.08065), whose masks may exceed 1: what a kept unit writes is
multiplied by s = exp θ, so that it can make up for what its neighbours no longer write. θ starts at 0, and its gradient
is the Taylor term that importance is made of: with m the mask, dL/dθ = dL/d(log m) = m·dL/dm. So it costs no further
pass. It is for units that linear maps or convolutions read: KV groups, heads, MLP channels. The residual width, which
norms read, and layers have none.

The cut multiplies the columns that read a unit by s, and computes what the masked model computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..archs.bind import BoundSpec
from .attach import gates_of, masked_inputs


def folded_scales(log_scales: Mapping[str, Tensor], bound: BoundSpec) -> dict[str, Tensor]:
    """What the weights that read units are multiplied by, by the names of parameters.

    Args:
        log_scales: θ, `[rows, units]` per dim that has scales.
        bound: the architecture.

    Returns:
        Float32 factors that broadcast over a weight, `[1, inputs]` of a linear map and `[1, inputs, 1, 1]` of a
        convolution.
    """
    factors: dict[str, Tensor] = {}
    for name, scales in log_scales.items():
        for path, row, shape in masked_inputs(bound, name):
            weight = f"{path}.weight"
            over_inputs = scales[row].exp()[None, :, None].expand(shape).reshape(-1)
            behind = (1,) * (len(bound.params[weight].axes) - 2)
            factors[weight] = factors.get(weight, 1) * over_inputs.view(1, -1, *behind)
    return factors


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Run a model on weights that its scales are folded into, rounded to their own precision, for a while."""
    gates = gates_of(model)
    factors = folded_scales(gates.scales, gates.attachment.bound)
    weights = {name: model.get_parameter(name) for name in factors}
    before, scales = {name: weight.data for name, weight in weights.items()}, gates.scales
    try:
        gates.scales = {}
        for name, weight in weights.items():
            weight.data = (weight.data * factors[name]).to(weight.dtype)
        yield
    finally:
        gates.scales = scales
        for name, weight in weights.items():
            weight.data = before[name]
