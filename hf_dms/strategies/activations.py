"""Criteria on activations, at the inputs of the maps that read a unit: Wanda-sp and FLAP.

With W the weight of such a map and x_j its inputs that belong to unit j:

- Wanda-sp: Σ_i |W_ij|·‖x_j‖₂; every layer loses the same share (Sun et al., arXiv 2306.11695, structured by
  An et al., arXiv 2312.11983).
- FLAP: Var(x_j)·‖W_:j‖₂², standardised per map, then one threshold for the model (An et al., WIFV with AL-AM). The
  paper also adds a bias that restores the mean of the removed units. It is left out: most stock classes have no bias
  there, and least-squares repair takes its place.

If a unit has several inputs (a head), Wanda-sp takes the sum over them and FLAP the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.plain_view import plain_weight, submodule
from ..gating.attach import gates_of
from ..gating.places import masked_inputs, unit_axis
from ..masked_ops import Span, of_units
from .allocate import Batches, Criterion, Scores


class _Moments:
    """Sums over positions of a map's inputs, on one axis: how many, Σx and Σx², per input, in float64."""

    def __init__(self, inputs: int, axis: int = -1) -> None:
        self.axis = axis
        self.count = 0
        self.total = torch.zeros(inputs, dtype=torch.float64)
        self.squares = torch.zeros(inputs, dtype=torch.float64)

    def __call__(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].detach().movedim(self.axis, -1).flatten(0, -2).double()
        self.count += len(rows)
        self.total += rows.sum(0).cpu()  # sum first, so that only one number per input leaves the device
        self.squares += rows.square().sum(0).cpu()

    def norm(self) -> Tensor:
        return self.squares.sqrt()

    def variance(self) -> Tensor:
        mean = self.total / self.count
        # E[x²] - E[x]² loses digits where the mean is large: hence float64, and 0 in place of a small negative number.
        # The last factor makes it the unbiased estimate.
        return (self.squares / self.count - mean.square()).clamp(min=0) * self.count / max(self.count - 1, 1)


@torch.no_grad()
def _moments(model: PreTrainedModel, batches: Batches) -> dict[str, list[tuple[int, Span, str, Any]]]:
    """Per dim, for every map that reads it: (row, span on its inputs, path, moments)."""
    gates, bound = gates_of(model), gates_of(model).attachment.bound
    found: dict[str, list] = {name: [] for name in gates.dims}
    handles = []
    for name in gates.dims:
        for path, row, span in masked_inputs(bound, name):
            inputs = bound.product(bound.params[f"{path}.weight"].axes[1])
            moments = _Moments(inputs, unit_axis(bound, path))
            handles.append(submodule(model, path).register_forward_pre_hook(moments))
            found[name].append((row, span, path, moments))
    gates.rounded = {name: torch.full((dim.rows,), dim.units) for name, dim in gates.dims.items()}  # nothing is masked
    model.eval()
    try:
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        gates.rounded = None
        for handle in handles:
            handle.remove()
    return found


def wanda_metric(weight: Tensor, norm: Tensor) -> Tensor:
    """Σ_i |W_ij|·‖x_j‖₂ of every input j.

    Args:
        weight: W `[outputs, inputs]`.
        norm: ‖x_j‖₂ over all positions, `[inputs]`.

    Examples:
        >>> wanda_metric(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([2.0, 4.0]))
        tensor([ 8., 10.])
    """
    return weight.abs().sum(0) * norm


def flap_metric(weight: Tensor, variance: Tensor) -> Tensor:
    """Var(x_j)·‖W_:j‖₂² of every input j, with mean 0 and standard deviation 1 over the inputs.

    Args:
        weight: W `[outputs, inputs]`.
        variance: of x_j over all positions, `[inputs]`.

    Examples:
        >>> flap_metric(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1.0, 1.0, 5.0]))  # of 1, 4, 0
        tensor([-0.3203,  1.1209, -0.8006])
    """
    metric = variance * weight.square().sum(0)
    return (metric - metric.mean()) / metric.std().clamp(min=1e-30)


def _scores(
    model: PreTrainedModel, batches: Batches, metric: Callable[[Tensor, _Moments], Tensor], pool: Callable[..., Tensor]
) -> Scores:
    """Scores of units from the maps that read them.

    Args:
        model: a model with gates.
        batches: keyword arguments of forward passes.
        metric: function of a map's weight `[outputs, inputs]` and the moments of its inputs; a number per input.
        pool: reduces the numbers of a unit's inputs to one, such as `torch.sum`.
    """
    gates = gates_of(model)
    scores = {name: torch.zeros(dim.rows, dim.units, dtype=torch.float64) for name, dim in gates.dims.items()}
    for name, maps in _moments(model, batches).items():
        for row, span, path, moments in maps:
            weight = plain_weight(model, f"{path}.weight").double().cpu()
            per_input = metric(weight.movedim(1, -1).flatten(0, -2), moments)  # kernel positions count as outputs
            scores[name][row] += pool(of_units(per_input, span).movedim(1, 0).flatten(1), -1)
    return scores


def wanda_sp_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Σ |W_ij|·‖x_j‖₂ over the outputs of the maps that read a unit, and over its inputs."""
    return _scores(model, batches, lambda weight, moments: wanda_metric(weight, moments.norm()), torch.sum)


def flap_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """Var(x_j)·‖W_:j‖₂² of the map that reads a unit, standardised over the map's inputs; mean over a unit's inputs."""
    return _scores(model, batches, lambda weight, moments: flap_metric(weight, moments.variance()), torch.mean)


WANDA_SP = Criterion(wanda_sp_scores, allocation="equal", dims=("layer",))
FLAP = Criterion(flap_scores, allocation="global", dims=("layer",))
