"""Searches that try whole plans: the kinds of search to which the DMS paper (arXiv 2405.07194) compares its results.

Units go in the order of one-shot Taylor importance on a quarter of the batches; only sizes are searched. A candidate is
tried as a hard-masked dense model, and all candidates on the same few batches. The number of candidates follows from
the number of batches that are left, because each try counts its passes.

- zero_shot: the best of random plans by ZiCo's score, Σ over maps of log Σ over weights of E|g| / std(g) over batches,
  with g the gradient of the loss (Li et al., arXiv 2301.11300). As in the paper: the score, no training. Different: the
  weights are pretrained here and random in the paper; plans are random here and evolved in the paper.
- one_shot: evolution by the loss of subnets of one supernet, after ScaleNet (Xie et al., arXiv 2207.07267). The
  supernet is the dense model with its units in order. In the paper the supernet is trained for this, which takes more
  than the budget here.
- multi_shot: greedy steps of the resource, each where it costs least, after Amplification (Liu et al., "Greedy Network
  Enlarging"), run backwards. The paper enlarges the network, and trains every candidate for a while. Here a step
  shrinks one dim in a quarter of the layers.
- compound: all dims by the same ratio, as EfficientNet scales (Tan and Le, arXiv 1905.11946). The paper also fits the
  proportions of the dims on a grid of trained models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..gates import Gates
from ..gating.attach import gates_of
from ..refit.curvature import frozen
from ..topk import ranks
from .allocate import Batches, Criterion, Scores, largest_fitting, loss_of, of_every_row
from .learned import Masks, hard_masks, masked_by
from .taylor import TAYLOR, vector_scores

BATCHES_A_TRY = 2
QUARTERS = 4
SPREAD = 0.3  # size of a mutation: standard deviation of the logarithm of a share

Genes = dict[str, Tensor]  # per dim, the wanted share of units, `[ratios]`, before all are scaled to the budget
Fitness = Callable[[Masks], float]


def sizes_of(gates: Gates, genes: Genes) -> dict[str, Tensor]:
    """The largest sizes `[rows]` in proportion to genes that fit the budget."""
    units = {name: gates.dims[name].units for name in genes}
    # At share 1 even the smallest gene then asks for a whole dim, so the largest fitting share is always inside [0, 1].
    most = 1 / min(float(shares.min()) for shares in genes.values())

    def at(share: float) -> dict[str, Tensor]:
        return {name: (share * most * genes[name] * units[name]).floor().clamp(1, units[name]) for name in genes}

    return largest_fitting(gates, at)


def random_genes(gates: Gates) -> Genes:
    """A wanted share for every ratio, uniform in (0.1, 1)."""
    device = gates.prune_ratio.device
    free = {name: dim.num_ratios for name, dim in gates.dims.items() if dim.follows is None}
    return {name: torch.rand(count, device=device) * 0.9 + 0.1 for name, count in free.items()}


def evolve(gates: Gates, fitness: Fitness, tries: int, mutate: bool) -> dict[str, Tensor]:
    """The sizes of the fittest of `tries` random plans. With `mutate`, the second half mutates the best so far."""
    best, fittest = random_genes(gates), -torch.inf
    for number in range(tries):
        genes = random_genes(gates)
        # A mutation multiplies, because shares of 0.1 and of 0.9 should move by the same factor.
        if mutate and number > tries // 2:
            genes = {n: (g * (SPREAD * torch.randn_like(g)).exp()).clamp(0.02, 1) for n, g in best.items()}
        found = fitness(hard_masks(gates, sizes_of(gates, genes)))
        if found > fittest:
            best, fittest = genes, found
    return sizes_of(gates, best)


def shrink(gates: Gates, fitness: Fitness, steps: int) -> dict[str, Tensor]:
    """Sizes after greedy steps. Each step shrinks the dim, and quarter of its ratios, that costs the least fitness.

    Args:
        gates: the gates; the steps end at their target.
        fitness: fitness of hard masks.
        steps: number of steps if each saves an equal share of the resource. There are more if a step cannot save that.
    """
    goal, now = gates.schedule.target, {name: torch.ones_like(genes) for name, genes in random_genes(gates).items()}
    step, resource = (1 - goal) / steps, 1.0
    while resource > goal:
        target = max(resource - step, goal)
        options = [
            _shrunk(gates, now, name, places, target)
            for name, shares in now.items()
            for places in torch.arange(len(shares), device=shares.device).tensor_split(min(QUARTERS, len(shares)))
        ]
        # Sizes are rounded: a step may change nothing, and the loop would not end.
        options = [option for option in options if _resource(gates, option) < resource]
        now = max(options, key=lambda option: fitness(hard_masks(gates, _whole(gates, option))))
        resource = _resource(gates, now)
    return _whole(gates, now)


def _shrunk(gates: Gates, now: Genes, name: str, places: Tensor, target: float) -> Genes:
    """The shares with some of them lowered until the resource meets a target, or to 0 if it cannot be met."""

    def at(factor: float) -> Genes:
        return now | {name: now[name].index_copy(0, places, now[name][places] * factor)}

    low, high = 0.0, 1.0
    # 2^-12 of a share; the sizes are rounded to whole units anyway.
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _resource(gates, at(middle)) <= target else (low, middle)
    return at(low)


def _resource(gates: Gates, shares: Genes) -> float:
    return float(gates.resource(gates.dense_sizes() | _whole(gates, shares)))


def _whole(gates: Gates, shares: Genes) -> dict[str, Tensor]:
    """Sizes `[rows]` of shares of the dense ones."""
    units = {name: gates.dims[name].units for name in shares}
    return of_every_row(gates, {n: (s * units[n]).round().clamp(1, units[n]) for n, s in shares.items()})


# ---- how good a candidate is -----------------------------------------------------------------------------------------
def minus_loss(model: PreTrainedModel, masks: Masks, batches: Batches) -> Fitness:
    """Minus the mean loss of the masked model."""

    @torch.no_grad()
    def fitness(candidate: Masks) -> float:
        masks.update(candidate)
        return -sum(float(loss_of(model, batch)) for batch in batches) / len(batches)

    return fitness


def zico(gradients: Sequence[Tensor]) -> Tensor:
    """log of the sum over weights of E|g| / std(g). Weights with a constant gradient do not count.

    Args:
        gradients: one gradient per batch, all of the same shape.

    Example:
        >>> zico([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 8.0])])  # of 2 / 1 and 6 / 2
        tensor(1.6094)
    """
    stacked = torch.stack(list(gradients))
    deviation = stacked.std(0, correction=0)
    # One batch, or a weight behind a mask of 0: the standard deviation is 0, and the ratio would be infinite.
    ratio = torch.where(deviation > 0, stacked.abs().mean(0) / deviation, 0)
    return ratio.sum().log()


def zico_score(model: PreTrainedModel, masks: Masks, batches: Batches) -> Fitness:
    """ZiCo's score of the masked model, over the matrices and kernels inside its layers."""
    bound = gates_of(model).attachment.bound
    names = [name for name, param in bound.params.items() if param.layer is not None and len(param.axes) in (2, 4)]
    weights = [model.get_parameter(name) for name in names]

    def fitness(candidate: Masks) -> float:
        masks.update(candidate)
        for weight in weights:
            weight.requires_grad_(True)
        found = [torch.autograd.grad(loss_of(model, batch), weights) for batch in batches]
        for weight in weights:
            weight.requires_grad_(False)
        # A map that is masked whole has the logarithm of 0. Its weight in the sum is then very low, not minus infinity,
        # which would make all such plans equal.
        return float(sum(zico(gradients).clamp(min=-100) for gradients in zip(*found)))

    return fitness


# ---- criteria --------------------------------------------------------------------------------------------------------
def candidate_scores(kind: str) -> Callable[[PreTrainedModel, Batches], Scores]:
    """The `scores` of a criterion that tries plans: zero_shot, one_shot or multi_shot."""

    def scores(model: PreTrainedModel, batches: Batches) -> Scores:
        gates = gates_of(model)
        first = max(len(batches) // 4, 1)
        for name, values in vector_scores(model, batches[:first]).items():
            gates.raw_importance(name).copy_(values)
        # The same batches for every candidate: a difference of losses then comes from the plans alone.
        shown = list(batches[first : first + BATCHES_A_TRY]) or list(batches[:1])
        tries = max((len(batches) - first) // len(shown), 1)
        with frozen(model), masked_by(model) as masks:
            fitness = (zico_score if kind == "zero_shot" else minus_loss)(model, masks, shown)
            if kind == "multi_shot":
                options = sum(min(QUARTERS, dim.num_ratios) for dim in gates.dims.values())  # to try in a step
                sizes = shrink(gates, fitness, max(tries // options, 1))
            else:
                sizes = evolve(gates, fitness, tries, mutate=kind == "one_shot")
        return {name: _above(gates, name, size) for name, size in sizes.items()}

    return scores


def _above(gates: Gates, name: str, size: Tensor) -> Tensor:
    """The rank of each unit minus that of the last kept unit, as a share of all units: units above 0 stay."""
    units = gates.dims[name].units
    return (ranks(gates.importance(name)) + 0.5 - (units - size[:, None])) / units


CANDIDATES = {
    "compound": Criterion(TAYLOR.scores, allocation="equal"),
    **{
        kind: Criterion(candidate_scores(kind), allocation="global", dims=("layer", "depth"))
        for kind in ("multi_shot", "one_shot", "zero_shot")
    },
}
