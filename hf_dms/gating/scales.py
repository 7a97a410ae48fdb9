"""The scales of units go into the weights that read them.

`dms.scales` follows DDP (Huang et al., arXiv 2603.08065), whose masks may exceed 1. The output of a kept unit is
multiplied by s = exp θ, so that the unit can make up for what its neighbours no longer write. θ starts at 0. Its
gradient is the Taylor term that importance is made of: with m the mask, dL/dθ = dL/d(log m) = m·dL/dm. So scales cost
no further pass. Units that linear maps or convolutions read have scales: KV groups, heads, MLP channels. Norms read the
residual width; with `scales: norms` the output of each norm is scaled, by numbers of its own. Batch norms and layers
have no scales.

The cut multiplies the columns that read a unit, and the weights of norms, by s. It computes what the masked model
computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..archs.bind import BoundSpec
from ..masked_ops import spread
from .attach import gates_of
from .places import NORMS, masked_inputs, norm_spans, scaled_norms


def scale_rate(progress: float) -> float:
    """Learning rate of the scales relative to that of the prune ratios, at a point of the search in [0, 1]."""
    return 1 - progress


def folded_scales(log_scales: Mapping[str, Tensor], bound: BoundSpec) -> dict[str, Tensor]:
    """The factors of the weights that read units, by the names of parameters.

    Args:
        log_scales: θ, `[rows, units]` per dim that has scales, `[norms, units]` per name of `scaled_norms`.
        bound: the architecture.

    Returns:
        Float32 factors that broadcast over a parameter: `[1, inputs]` for a linear map, `[1, inputs, 1, 1]` for a
        convolution, `[units]` for a norm's weight and bias.
    """
    factors: dict[str, Tensor] = {}
    for name, scales in log_scales.items():
        for row, path in enumerate(scaled_norms(bound)[name] if name.startswith(NORMS) else ()):
            own = [f"{path}.{leaf}" for leaf in ("weight", "bias") if f"{path}.{leaf}" in bound.params]
            for span in norm_spans(bound, path, name):
                over_units = spread(scales[row].exp(), span, other=1.0)
                # A norm may have two dims with scales one after the other, so its factors multiply.
                factors |= {parameter: factors.get(parameter, 1) * over_units for parameter in own}
        # The columns of a map belong to its inputs: W·(s∘x) = (W·diag(s))·x.
        for path, row, span in masked_inputs(bound, name):
            weight = f"{path}.weight"
            over_inputs = spread(scales[row].exp(), span, other=1.0)
            behind = (1,) * (len(bound.params[weight].axes) - 2)
            # So may what a map reads, and it may be a product of two such dims.
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
        # Otherwise the scales would act twice, in the weights and in the masks.
        gates.scales = {}
        for name, weight in weights.items():
            weight.data = (weight.data * factors[name]).to(weight.dtype)
        yield
    finally:
        gates.scales = scales
        for name, weight in weights.items():
            weight.data = before[name]
