"""Ridge regression of a map's change on the errors of its output, from sums alone, and the choice of the ridge."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import HfDmsError
from .curvature import Sums

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # the candidates, relative to the mean square of a map's inputs
HELD_OUT = 4  # one batch in this many is held out to choose the ridge
FIXED_RIDGE = 0.1  # with a single batch, where no batch can be held out to choose the ridge


@torch.no_grad()
def update_(modules: Sequence[Any], parts: Sequence[Sums], ridge: float | None, name: str) -> None:
    """Change maps that have the same inputs by ridge regression on the errors of their outputs.

    Args:
        modules: linear maps or convolutions, all with a bias or all without.
        parts: the sums of each part of the batches; the errors of all maps side by side.
        ridge: relative to the mean square of the inputs. Default: chosen on the last part.
        name: the maps in an error.

    Raises:
        ValueError: the sums are not finite, or not positive definite.
    """
    # Batches go to the parts in turn, so the last part is spread over all of them.
    *fitted, last = parts
    width = modules[0].weight.flatten(1).shape[1]
    if ridge is None:
        ridge = best_ridge(sum(fitted[1:], fitted[0]), last, width) if fitted else FIXED_RIDGE
    # With the ridge chosen, the held-out part takes part in the fit as well.
    change = ridge_change(sum(fitted, last), width, ridge).T
    if not change.isfinite().all():
        raise HfDmsError(
            f"repair: the least squares of {name} have no finite solution at ridge {ridge}. Raise it; if that does not "
            "help, the activations of the model on these batches are not finite: check the data, or use a wider dtype."
        )
    for module, part in zip(modules, change.split([len(module.weight) for module in modules])):
        # The change is added in float64, and rounded once to the precision of the weight.
        module.weight.copy_((module.weight.flatten(1).double() + part[:, :width]).view_as(module.weight))
        if module.bias is not None:
            module.bias.copy_(module.bias.double() + part[:, width])


def ridge_change(sums: Sums, width: int, ridge: float) -> Tensor:
    """ΔWᵀ = (AᵀDA + ridge·mean(diag AᵀDA)·I)⁻¹ AᵀDR, `[inputs, outputs]`; not finite where there is no solution.

    Args:
        sums: sums of a map.
        width: number of inputs without the bias. The mean is over these.
        ridge: relative to their mean square.
    """
    gram = sums.gram.clone()
    # At least the smallest positive number: inputs that are all 0 would make the matrix singular.
    gram.diagonal().add_((ridge * gram.diagonal()[:width].mean()).clamp(min=torch.finfo(gram.dtype).tiny))
    # `cholesky` would raise an error of its own here; NaN is handled by the caller, who knows the map's name.
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.full_like(sums.moment, torch.nan) if failed else torch.cholesky_solve(sums.moment, factor)


def best_ridge(fitted: Sums, held_out: Sums, width: int) -> float:
    """The ridge in `RIDGES` that leaves the least squared error |R − A ΔWᵀ|² on held-out sums.

    The error first falls and then rises with the ridge. So the search starts in the middle and solves only the
    neighbours of the best ridge so far. Of equal ridges the larger is taken. Float32 is precise enough to compare them,
    and takes half the time.

    The held-out error needs only sums, no data: |R − A ΔWᵀ|² = tr(ΔW (AᵀA) ΔWᵀ) − 2 tr(ΔW AᵀR) + |R|², each weighted
    by D.
    """
    fitted, held_out = fitted.to(torch.float32), held_out.to(torch.float32)

    @functools.cache
    def error(place: int) -> float:
        change = ridge_change(fitted, width, RIDGES[place])
        left = (change * (held_out.gram @ change - 2 * held_out.moment)).sum() + held_out.missing
        return float(left.nan_to_num(torch.inf))

    best, before = RIDGES.index(FIXED_RIDGE), -1
    while best != before:
        before = best
        # From the larger ridge down: `min` takes the first of equal errors.
        best = min(range(min(best + 1, len(RIDGES) - 1), max(best - 1, 0) - 1, -1), key=error)
    return RIDGES[best]
