"""One map at every width: the least-squares refit on its first k units, for any k, from one Cholesky factor.

With the units in order of importance, H = L Lᵀ and Y = L⁻¹M, the refit on the first k units solves L_kᵀ W = Y_k, with
L_k the leading corner of L: no width needs a factor of its own. A search interpolates between neighbouring widths,

    y = ((1 − f) W_lo + f W_hi) x,   k = (1 − a) N = lo + f (hi − lo),

so the prune ratio a gets the gradient of the loss after the refit. A mask would give it the gradient before the refit.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.restoring import evaluating
from ..errors import HfDmsError
from .curvature import Key, Sums, Writer, collect_, with_bias, writers
from .layerwise import LayerWalk
from .order import Elimination, eliminate
from .stream import stream_dim
from .writes import find_stream_modules, targets_of_layers

# 0.1 was the best of three ridges for a repair on 16,384 tokens (benchmarks/README.md).
ORDER_RIDGE, REFIT_RIDGE = 0.01, 0.1  # relative to the mean square of a map's inputs
BLOCK = 8  # units of one input each that are removed before costs are computed again
LEVELS = 16  # a search interpolates between this many widths


class RefittedMap:
    """A linear map that writes into the stream, refitted at every width.

    Args:
        module: the map. The ridge pulls the refit towards its weights.
        writer: its units.
        sums: sums over its inputs, in the model with all earlier maps refitted.
        metric: G of its outputs (curvature.py), None for the identity.
        ridges: the ridge of the order, and that of the refits.
        levels: number of widths between which `weight_between` interpolates.
        block: see `eliminate`.

    Raises:
        HfDmsError: the least squares have no solution, because the activations are not finite.
    """

    def __init__(
        self,
        module: Any,
        writer: Writer,
        sums: Sums,
        metric: Tensor | None,
        ridges: tuple[float, float] = (ORDER_RIDGE, REFIT_RIDGE),
        levels: int = LEVELS,
        block: int = BLOCK,
    ) -> None:
        units = writer.units.to(sums.gram.device)
        # The sums hold the errors R = target - A·W of the present output. For the target itself, add AᵀDA·W.
        dense = with_bias(module)
        # Means over positions, so that ridges and costs do not depend on the number of tokens.
        gram, moment = sums.gram / sums.total, (sums.moment + sums.gram @ dense) / sums.total
        unit = gram.diagonal()[: module.in_features].mean().clamp(min=torch.finfo(gram.dtype).tiny)
        self.dim, self.size, self.num_units = writer.dim, units.shape[1], len(units)
        try:
            # The ridge ρ pulls towards the present weights: (H + ρI) W = M + ρ W_dense.
            damped = [(_damped(gram, ridge * unit), moment + ridge * unit * dense) for ridge in ridges]
            # A unit of several inputs (a head) is a block already, and there are few of them.
            block = block if self.size == 1 else 1
            self.elimination: Elimination = eliminate(*damped[0], units, metric, block=block)
            always = torch.arange(module.in_features, len(gram), device=gram.device)  # the bias
            # The bias first, since every width has it; then the inputs of the most important unit, and so on.
            self.columns = torch.cat([always, units[self.elimination.order].flatten()])
            self.always = len(always)
            gram, moment = damped[1]
            factor = torch.linalg.cholesky(gram[self.columns][:, self.columns])
            solved = torch.linalg.solve_triangular(factor, moment[self.columns], upper=False)
        except torch.linalg.LinAlgError:
            raise HfDmsError(
                f"The least squares of {writer.path} have no solution: its activations on these batches are not "
                "finite. Check the data, or use a wider dtype."
            ) from None
        # Solved in float64 once; float32 is enough to read a width from it, and takes half the memory.
        self.factor, self.solved = factor.float(), solved.float()
        self.widths = sorted({max(1, round(self.num_units * j / levels)) for j in range(levels + 1)})
        self._weights: dict[int, Tensor] = {}

    def weight(self, width: int) -> Tensor:
        """The refit on the first `width` units, `[outputs, bias and inputs in the map's order]` float32."""
        if width not in self._weights:
            end = self.always + width * self.size
            # The leading corner of a Cholesky factor is the factor of the leading corner: this is the refit on the
            # first units.
            upper = self.factor[:end, :end].T
            self._weights[width] = torch.linalg.solve_triangular(upper, self.solved[:end], upper=True).T.contiguous()
        return self._weights[width]

    def weight_between(self, width: Tensor) -> Tensor:
        """The weights of a fractional width: interpolated linearly between two levels, differentiable in the width.

        Args:
            width: a scalar in [1, units].

        Returns:
            `[outputs, bias and inputs in the map's order]`, up to the next level's width.
        """
        # Within the list at both ends: the smallest and the largest width have a neighbour on one side only.
        position = min(max(bisect.bisect_right(self.widths, float(width.detach())), 1), len(self.widths) - 1)
        lowest, highest = self.widths[position - 1], self.widths[position]
        above = self.weight(highest)
        # The narrower refit has weight 0 for the units that it lacks.
        below = F.pad(self.weight(lowest), (0, (highest - lowest) * self.size))
        for known in set(self._weights) - {lowest, highest}:  # keep two levels in memory, not all of them
            del self._weights[known]
        return below + (width - lowest) / (highest - lowest) * (above - below)

    def apply(self, inputs: Tensor, width: Tensor | int) -> Tensor:
        """The output of the map with its first `width` units.

        Args:
            inputs: `[..., inputs]`, all inputs, in the model's order.
            width: a whole number, or a scalar tensor for `weight_between`.
        """
        weight = self.weight(width) if isinstance(width, int) else self.weight_between(width)
        weight = weight.to(inputs.dtype)
        columns = self.columns[self.always : weight.shape[1]]
        bias = weight[:, 0] if self.always else None
        return F.linear(inputs.index_select(-1, columns), weight[:, self.always :], bias)


def _damped(gram: Tensor, damping: Tensor) -> Tensor:
    return gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    bound: BoundSpec,
    batches: Iterable[Mapping[str, Tensor]],
    factors: Mapping[Key, Tensor],
    widths: Mapping[str, Tensor],
    **options: Any,
) -> dict[Key, RefittedMap]:
    """Go through a model's layers and refit each map, on the activations of the model with all earlier maps refitted.

    Args:
        model: a dense model; it is not modified.
        bound: its architecture.
        batches: keyword arguments of forward passes; labels are ignored.
        factors: G of every map (`stream_factors`).
        widths: per dim, the units that each layer keeps, `[layers]`: int64, or float for widths between levels.
        options: options of `RefittedMap`.

    Returns:
        For each layer and path of a map that reads one of these dims, the map at every width.
    """
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    masks = [batch.get("attention_mask") for batch in batches]
    found: dict[Key, RefittedMap] = {}
    everything = torch.arange(bound.sizes[stream_dim(bound)])
    with evaluating(model):
        # One model serves as both: maps are replaced only after the teacher has passed their layer.
        teacher, student = LayerWalk(model, bound, batches), LayerWalk(model, bound, batches)
        places = find_stream_modules(teacher)
        by_path = {writer.path: writer for writer in writers(bound, places, widths)}
        for layer in range(bound.num_layers):
            _, targets = targets_of_layers(teacher, range(layer, layer + 1), everything)
            with contextlib.ExitStack() as stack:
                for path, writer in by_path.items():
                    module: Any = student.layers[layer].get_submodule(path)
                    sums = Sums.of(module)
                    collect_([sums], student, places, layer, path, targets[path], masks)
                    refitted = RefittedMap(module, writer, sums, factors.get((layer, path)), **options)
                    width = widths[writer.dim][layer]
                    whole = not width.is_floating_point()
                    stack.enter_context(_replaced(module, refitted, int(width) if whole else width))
                    found[layer, path] = refitted
                student.advance(layer)
    return found


@contextlib.contextmanager
def _replaced(module: nn.Module, refitted: RefittedMap, width: Tensor | int) -> Iterator[None]:
    """Context: a map runs as refitted at one width."""
    before = module.__dict__.get("forward")
    module.forward = lambda inputs: refitted.apply(inputs, width)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
