"""How much of a repair stays: the share of its change with which the task's loss is least.

A repair brings the residual stream close to the dense model's. Where the weights have learned the task's text instead
(`dms.scales`), that can raise the loss. Between the weights before, W, and after, W + Δ, the loss on a line

    W + share·Δ,  share in `SHARES`

is measured on some of the batches, which the repair has seen too, and the best share stays; the larger one where two
are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HfDmsError
from .curvature import widened

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


class Interpolation:
    """The weights of a model as they were, to go back to some of the way.

    Attributes:
        share: of what changed since, that the weights have now.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.share = model, 1.0
        self._before = {name: weight.detach().cpu().clone() for name, weight in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and, of batch norms, running statistics, which a repair takes anew."""
        yield from self.model.named_parameters()
        yield from ((name, buffer) for name, buffer in self.model.named_buffers() if buffer.is_floating_point())

    @torch.no_grad()
    def keep_best_share_(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Move the weights to the best share of what changed.

        Args:
            batches: keyword arguments of forward passes, with labels.

        Raises:
            ValueError: the model gives no loss on them.
        """
        changed = []
        for name, weight in self._named():
            before, after = self._before[name], weight.detach().cpu().clone()
            if not torch.equal(before, after):
                changed.append((weight, before, after))
        losses = {}
        for share in SHARES:
            self._move_(changed, share)
            losses[share] = self._loss(batches)
        self.share = min(losses, key=lambda share: losses[share])
        self._move_(changed, self.share)

    @staticmethod
    def _move_(changed: Iterable[tuple[Tensor, Tensor, Tensor]], share: float) -> None:
        for weight, before, after in changed:
            if share in (0.0, 1.0):  # exactly what they were
                weight.copy_(after if share else before)
            else:
                weight.copy_(torch.lerp(widened(before), widened(after), share))

    def _loss(self, batches: Sequence[Mapping[str, Tensor]]) -> float:
        total = 0.0
        for batch in batches:
            there = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            loss = getattr(self.model(**there), "loss", None)
            if loss is None:
                raise HfDmsError(
                    "repair: with interpolate the batches need labels, from which the model computes its loss. "
                    f"These have {', '.join(batch)}."
                )
            total += float(loss)
        return total / len(batches) if math.isfinite(total) else math.inf
