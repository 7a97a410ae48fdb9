"""Whether a model can be repaired, from its config alone: a small random model of the same kind is tried.

It depends only on how layers write into the residual stream (`writes.find_stream_modules`), not on their sizes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..cut.formats import pruned_class_and_config
from ..cut.plan import Plan
from ..cut.verify import dummy_inputs
from .layerwise import LayerWalk
from .stream import check_streams, stream_dim
from .writes import find_stream_modules

UNITS = 8  # of each dim of the small model, at most
LAYERS = 2  # of each stack; the first one of a stage can be of another kind


@torch.no_grad()
def check_repairable(model: PreTrainedModel, bound: BoundSpec) -> None:
    """Check that `repair_` can work on models cut from this one.

    Args:
        model: the dense model, on the meta device or any other; its weights do not matter.
        bound: its architecture.

    Raises:
        HfDmsError: its layers do not write into the residual stream as `find_stream_modules` knows it.
    """
    check_streams(bound)  # a small model cannot be built where every block has a stream of its own
    # per_layer, because the small sizes need not be within a stock config's limits.
    cls, config = pruned_class_and_config(model, bound, _small(bound), "per_layer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = cls._from_config(config, dtype=torch.float32).eval()
        for parameter in small.parameters():
            # Fresh scales and norms are exactly 1, and a layer that multiplies by 1 looks like one that does not.
            parameter.uniform_(0.5, 1.5)
            if parameter.dim() > 1:
                parameter /= parameter[0].numel()  # keeps activations near 1 where no norm bounds them
        # Every layer, not only the first: kinds of layers can alternate.
        walk = LayerWalk(small, bound, [dummy_inputs(small)])
        for layer in range(len(walk.layers)):
            find_stream_modules(walk, layer)
            walk.advance(layer)


def check_one_stack(bound: BoundSpec) -> None:
    """Check that a model is one stack of layers, as a search over refitted weights needs it.

    Raises:
        HfDmsError: it has several.
    """
    stream_dim(bound)  # raises if there is more than one stack


def _small(bound: BoundSpec) -> Plan:
    """A plan that keeps the first units of every prunable dim, and the first layers."""
    units = {name: min(bound.sizes[name], LAYERS if name in bound.stacks else UNITS) for name in bound.spec.prunable}
    return Plan({name: (torch.arange(count),) * bound.rows(name) for name, count in units.items()})
