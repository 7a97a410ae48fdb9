"""How much of a repair to keep: the share of its change that gives the lowest task loss.

A repair brings the residual stream close to the dense model's. Where the search has adapted the model to the task's
text (`dms.scales`), that can raise the loss. With W the weights before the repair and W + Δ those after, the loss of

    W + share·Δ,  share in `SHARES`

is measured on some of the batches of the repair. The best share is kept; of two equal ones the larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HfDmsError
from .curvature import widened

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


class Interpolation:
    """A copy of a model's weights, to move back part of the way to.

    Attributes:
        share: the share of the change since the copy that the weights have now.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.share = model, 1.0
        self._before = {name: weight.detach().cpu().clone() for name, weight in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, and the running statistics of batch norms, which a repair measures again."""
        yield from self.model.named_parameters()
        yield from ((name, buffer) for name, buffer in self.model.named_buffers() if buffer.is_floating_point())

    @torch.no_grad()
    def keep_best_share_(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Move the weights to the best share of the change, in place.

        Args:
            batches: keyword arguments of forward passes, with labels.

        Raises:
            ValueError: the model gives no loss on them.
        """
        changed = []
        for name, weight in self._named():
            # On the CPU, one weight at a time: two more copies of a model may not fit beside both models.
            before, after = self._before[name], weight.detach().cpu().clone()
            if not torch.equal(before, after):
                changed.append((weight, before, after))
        losses = {}
        for share in SHARES:
            self._move_(changed, share)
            losses[share] = self.loss(batches)
        # `min` takes the first of equal values, and SHARES begins with the largest.
        self.share = min(losses, key=lambda share: losses[share])
        self._move_(changed, self.share)

    @staticmethod
    def _move_(changed: Iterable[tuple[Tensor, Tensor, Tensor]], share: float) -> None:
        for weight, before, after in changed:
            if share in (0.0, 1.0):  # an exact copy, without the rounding of lerp
                weight.copy_(after if share else before)
            else:
                weight.copy_(torch.lerp(widened(before), widened(after), share))

    def loss(self, batches: Sequence[Mapping[str, Tensor]]) -> float:
        """Mean loss of the model as it is; infinite if it is not finite.

        Raises:
            ValueError: the model gives no loss on the batches.
        """
        total = 0.0
        for batch in batches:
            loss = getattr(self.model(**send_to_device(batch, self.model.device)), "loss", None)
            if loss is None:
                raise HfDmsError(
                    "repair: with interpolate the batches need labels, from which the model computes its loss. "
                    f"These have {', '.join(batch)}."
                )
            total += float(loss)
        # No comparison with NaN is true, so `min` could take it for the least.
        return total / len(batches) if math.isfinite(total) else math.inf
