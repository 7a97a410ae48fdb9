"""Block influence: the score of a layer is 1 - cos(its input, its output) (ShortGPT, Men et al., arXiv 2403.03853)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..archs.plain_view import submodule
from ..gating.attach import gates_of
from .allocate import Batches, Criterion, Scores


@torch.no_grad()
def block_influence_scores(model: PreTrainedModel, batches: Batches) -> Scores:
    """1 - mean over positions of the cosine between a layer's input and its output, `[1, layers]`."""
    gates = gates_of(model)
    bound = gates.attachment.bound
    layers = list(submodule(model, bound.layers_path).children())
    total, count = torch.zeros(2, 1, len(layers), dtype=torch.float64)

    def add(index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after: Tensor = output[0] if isinstance(output, tuple) else output
            # float64: cosines near 1 differ in their last digits only, and those decide.
            cosines = F.cosine_similarity(before.double(), after.double(), dim=-1)
            total[0, index] += cosines.sum().cpu()
            count[0, index] += cosines.numel()

        return hook

    handles = [layer.register_forward_hook(add(i), with_kwargs=True) for i, layer in enumerate(layers)]
    gates.rounded = {name: torch.full((dim.rows,), dim.units) for name, dim in gates.dims.items()}  # nothing is masked
    model.eval()
    try:
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        gates.rounded = None
        for handle in handles:
            handle.remove()
    return {bound.depth: 1 - total / count.clamp(min=1)}


BLOCK_INFLUENCE = Criterion(block_influence_scores, allocation="global", dims=("depth",))
