"""What a model costs as a function of its gates, the resource loss and the falling target (section 3.3 of the paper).

A cost is a polynomial in the sizes of the dims: a Llama layer has `2·kv·rep·d·hidden + ... + 3·mlp·hidden + 2·hidden`
parameters (kv: key-value heads, rep: query heads per key-value head, d: width of a head). Whole sizes give an exact
count. Fractional sizes give the differentiable relaxation k̃ = (1 - a) N, which has the same gradient at every a. Each
layer's cost is multiplied by how much of the layer is kept. Layers come in stacks of equal layers: a Llama has one
stack, a network with stages has one per stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Monomial = tuple[str, ...]
Sizes = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """A resource as a polynomial in the sizes of the dims.

    Attributes:
        model: coefficient of each monomial outside the layers, e.g. `{("hidden",): 49152.0}`.
        stacks: for each stack of layers, by the name of its depth dim, the coefficient of each monomial of each layer,
            `[layers]` float64, e.g. `{"layers": {("hidden", "mlp"): [3., 3.]}}`.
    """

    model: dict[Monomial, float]
    stacks: dict[str, dict[Monomial, Tensor]]

    def count(self, sizes: Sizes, layers_kept: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate the polynomial.

        Args:
            sizes: units kept per dim, `[..., layers]`, or `[..., 1]` for a dim that the whole model shares; float or
                int, differentiable.
            layers_kept: `[..., layers]` in [0, 1] per stack, how much of each layer is counted. Default: all of each.

        Returns:
            `[...]` float64.
        """
        sizes = _in_double(sizes)
        total = torch.zeros((), dtype=torch.float64, device=next(iter(sizes.values())).device)
        for stack in self.stacks:
            cost, kept = self.per_layer(sizes, stack), (layers_kept or {}).get(stack)
            total = total + (cost if kept is None else cost * kept.double()).sum(-1)
        for monomial, coefficient in self.model.items():
            # Outside the layers there are only dims of the whole model, with one entry each.
            total = total + coefficient * _product(sizes, monomial).squeeze(-1)
        return total

    def per_layer(self, sizes: Sizes, stack: str = "layers") -> Tensor:
        """Cost of each layer of a stack, `[..., layers]` float64."""
        # Each term `[..., layers]`, or `[..., 1]` if it holds only dims of the whole model: broadcast before the sum.
        sizes = _in_double(sizes)
        terms = [coefficient * _product(sizes, monomial) for monomial, coefficient in self.stacks[stack].items()]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def to(self, device: torch.device) -> Cost:
        """The same cost for sizes on another device."""
        moved = {
            stack: {monomial: tensor.to(device) for monomial, tensor in terms.items()}
            for stack, terms in self.stacks.items()
        }
        return Cost(self.model, moved)

    def layers_only(self) -> Cost:
        """The same cost without what lies outside the layers."""
        return Cost(model={}, stacks=self.stacks)


def _in_double(sizes: Sizes) -> Sizes:
    # float32 has 24 bits, so a count above 16.7 million parameters would be off by some. Rounding counts thousands of
    # times, and to look at a dtype takes less time than to convert what is converted.
    return {name: size if size.dtype is torch.float64 else size.double() for name, size in sizes.items()}


def _product(sizes: Sizes, monomial: Monomial) -> Tensor:
    if not monomial:
        return torch.ones(1, dtype=torch.float64, device=next(iter(sizes.values())).device)
    return math.prod((sizes[dim] for dim in monomial[1:]), start=sizes[monomial[0]])


def resource_loss(resource: Tensor, target: Tensor | float) -> Tensor:
    """log(r / r_t) above the target, 0 at or below it (equation 6).

    Args:
        resource: r, current resource, any unit; differentiable.
        target: r_t in the same unit.

    Returns:
        `[...]`, not negative.

    Examples:
        >>> resource_loss(torch.tensor([0.4, 0.5, 1.0]), 0.5)
        tensor([0.0000, 0.0000, 0.6931])
    """
    # The ReLU, so that below the target only the task moves the ratios; the budget is met, not undercut.
    return torch.relu(torch.log(resource / target))


def scheduled_target(target: float, progress: float, ramp: float = 0.7, schedule: str = "geometric") -> float:
    """The target at a point of the search.

    Args:
        target: the final one, a fraction of the dense resource.
        progress: fraction of the search that is done, in [0, 1].
        ramp: fraction of the search over which the target falls from 1 to `target`.
        schedule: geometric, target^(progress / ramp), an equal factor each step; or constant.

    Examples:
        >>> [scheduled_target(0.25, p, ramp=0.5) for p in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.5, 0.25, 0.25]
    """
    if schedule == "constant":
        return target
    return target ** min(1.0, progress / ramp)
