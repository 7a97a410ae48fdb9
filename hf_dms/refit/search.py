"""A search over refitted weights: while ratios train, the maps run as least squares would leave them after the cut.

In training mode, a map that reads a refitted dim computes y = W(k) x in place of the masked y = W (m ∘ x). Here
k = (1 − a) N, and W(k) lies between two refits of levels.py. Ratio, resource loss and rounding are those of every
search. The order of the units is that of order.py. Each `refresh_` computes order and refits again; `choose_units_`
computes the order for the cut. In evaluation mode the model runs on hard masks and its own weights, as it will be cut.
Dims that no layer owns (hidden, layers) keep their masks, and all their units are open while maps are refitted.

A checkpoint stores only the ratios at the last refresh. Weights are frozen, so the same examples and ratios give the
same refits again.

Memory: per map, in float32 on the model's device, a Cholesky factor `[inputs, inputs]`, `[inputs, outputs]` numbers and
the weights at two widths; in float64 one factor `[hidden, hidden]`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cut.verify import open_gates
from ..errors import HfDmsError
from ..gates import Gates
from ..gating.attach import gates_of
from ..resource import Sizes
from .curvature import Key
from .layerwise import layers_of
from .levels import RefittedMap, sweep
from .one_shot import factors_of, rank_


class RefittedSearch:
    """The state of a search over refitted weights, beside the gates.

    Args:
        model: a model with gates, its weights frozen.
        batches: keyword arguments of forward passes with `labels`, to refit on.
        options: options of `RefittedMap`.

    Raises:
        ValueError: no dim of layers is pruned, or batches without labels.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> None:
        self.model, self.gates, self.options = model, gates_of(model), options
        self.bound = self.gates.attachment.bound
        self.batches = [send_to_device(batch, model.device) for batch in batches]
        self.dims = [name for name in self.gates.dims if self.bound.spec.dim(name).scope == "layer"]
        if not self.dims:
            raise HfDmsError(
                "dms.search_over = refitted refits widths of layers, prune names only "
                f"{', '.join(self.gates.dims)}. Add one, or write search_over: masks."
            )
        self.factors: dict[Key, Tensor] | None = None

    @torch.no_grad()
    def refresh_(self, ratio: Tensor | None = None) -> None:
        """Refit every map and rank its units, in the model that a cut at these ratios would give.

        Args:
            ratio: all prune ratios of the gates. Default: the current ones.
        """
        gates = self.gates
        gates.refit_ratio = (gates.prune_ratio if ratio is None else ratio).detach().clone()
        # The ratios of the last refresh are set for a moment, because widths follow from the ratios in the gates.
        now = gates.prune_ratio.clone()
        gates.prune_ratio.copy_(gates.refit_ratio)
        widths = {name: _width(gates, name) for name in self.dims}
        gates.prune_ratio.copy_(now)
        # The walk runs the dense model's layers. With masks on them, refits would make up for what is still there.
        with open_gates(self.model):
            # The gradient's factors are those of the dense model, which does not change: once is enough.
            if self.factors is None:
                self.factors = factors_of(self.model, self.bound, self.batches)
            maps = sweep(self.model, self.bound, self.batches, self.factors, widths, **self.options)
        rank_(gates, maps)
        self._install_(maps)

    @torch.no_grad()
    def choose_units_(self, sizes: Sizes, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Rank the units for the cut, by one more walk through the model, cut and refitted at whole sizes.

        Args:
            sizes: per dim the units that each row keeps, `[rows]` int64.
            batches: keyword arguments of forward passes. This happens once, so more batches than for a `refresh_` pay.
        """
        gates, sizes = self.gates, {name: sizes[name] for name in self.dims}
        with open_gates(self.model):
            if self.factors is None:
                self.factors = factors_of(self.model, self.bound, self.batches)
            batches = [send_to_device(batch, self.model.device) for batch in batches]
            rank_(gates, sweep(self.model, self.bound, batches, self.factors, sizes, **self.options))

    def _install_(self, maps: Mapping[Key, RefittedMap]) -> None:
        """Make the maps run refitted in training mode, until the gates are taken off."""
        first = not self.gates.refitted
        layers = layers_of(self.model, self.bound)
        for (layer, path), refitted in maps.items():
            module: Any = layers[layer].get_submodule(path)
            if first:
                self.gates.attachment.hooks.append(_Replaced(module))
                masked = module.forward
            else:  # replaced by an earlier refresh: keep the original masked forward
                masked = module.forward.args[0]
            module.forward = functools.partial(_forward, masked, self.gates, refitted, layer)
        self.gates.refitted = frozenset(self.dims)


class _Replaced:
    """Restores the `forward` of a module. It has the interface of a hook's handle, so `detach_` removes it like one."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)
        if self.before is not None:
            self.module.forward = self.before


def _width(gates: Gates, name: str) -> Tensor:
    """k = (1 − a) N of every row, at least one unit, `[rows]`."""
    return ((1 - gates.ratio(name)) * gates.dims[name].units).clamp(min=1)


def _forward(masked: Any, gates: Gates, refitted: RefittedMap, layer: int, inputs: Tensor) -> Tensor:
    if not gates.is_soft:
        return masked(inputs)
    return refitted.apply(inputs, _width(gates, refitted.dim)[layer])
