"""Whether a model can be repaired, known from its config alone: a small model of the same kind is tried.

What decides is how layers write into the residual stream (`layerwise.find_stream_modules`), which no size changes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..cut.formats import pruned_class_and_config
from ..cut.plan import Plan
from ..cut.verify import dummy_inputs
from .layerwise import LayerWalk, find_stream_modules

UNITS = 8  # of each dim of the small model, at most; it has one layer


@torch.no_grad()
def check_repairable(model: PreTrainedModel, bound: BoundSpec) -> None:
    """Check that `repair_` can work on models cut from this one.

    Args:
        model: the dense model, on the meta device or any other; its weights do not matter.
        bound: its architecture.

    Raises:
        HfDmsError: its layers do not write into the residual stream as `find_stream_modules` knows it.
    """
    cls, config = pruned_class_and_config(model, bound, _small(bound), "per_layer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = cls._from_config(config, dtype=torch.float32).eval()
        for parameter in small.parameters():
            parameter.uniform_(0.5, 1.5)  # so that no factor is 1 by accident, as a fresh layer scale is
        find_stream_modules(LayerWalk(small, bound, [dummy_inputs(small)]), bound)


def _small(bound: BoundSpec) -> Plan:
    """A plan that keeps the first units of every prunable dim, and one layer."""
    units = {name: 1 if name in bound.stacks else min(bound.sizes[name], UNITS) for name in bound.spec.prunable}
    return Plan({name: (torch.arange(count),) * bound.rows(name) for name, count in units.items()})
