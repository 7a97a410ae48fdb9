"""Running statistics of batch norms, taken anew: those of a cut model are not the ones that it was cut with.

During a search batch norms see units fade; what they remember is a moving average over many models. After a cut, and
after a repair, their means and variances are those of the smaller model on data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..archs.restoring import evaluating, restoring
from ..errors import HfDmsError

BATCHES = 64  # that statistics are taken from, where there is more data


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a model that keep running statistics; those that are frozen by their class are none."""
    found = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in found if module.track_running_stats]


@torch.no_grad()
def estimate_batch_norms_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Set the running statistics of a model's batch norms to the mean of those of batches, in place.

    Everything else of the model runs in evaluation mode meanwhile. A model without batch norms is left as it is.

    Args:
        model: the model.
        batches: keyword arguments of forward passes; labels are left out. Batches of one size, as in training.

    Raises:
        ValueError: no batches.
    """
    norms = batch_norms(model)
    if not norms:
        return
    device, seen = next(model.parameters()).device, 0
    with evaluating(model), restoring(norms, "momentum"):
        for batch in batches:
            if not seen:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain mean over batches
                    norm.train()
            model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
            seen += 1
    if not seen:
        raise HfDmsError(
            "estimate_batch_norms_ needs at least one batch, got none. The statistics were left as they are."
        )
