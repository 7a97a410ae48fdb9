"""The number of positions of an image at which each linear map and convolution of a model runs, to count its MACs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HfDmsError
from .bind import BoundSpec
from .skeleton import skeleton


@torch.no_grad()
def recorded_positions(bound: BoundSpec, model: Any) -> dict[str, int]:
    """Number of positions of every linear map and convolution, by its path: output size for one image / output units.

    They are recorded from a forward pass on the meta device, which computes shapes only.

    Args:
        bound: the architecture, with the shape of an image.
        model: a model of it; only its class and config are used.

    Raises:
        HfDmsError: the model cannot take an image of the size that its config names.
    """
    found: dict[str, int] = {}

    def record(path: str, module: nn.Linear | nn.Conv2d, args: tuple, output: Tensor) -> None:
        units = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        found[path] = found.get(path, 0) + output.numel() // units

    empty = skeleton(type(model), model.config).eval()
    for path, module in empty.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(functools.partial(record, path))
    shape = [bound.sizes[name] for name in bound.spec.image.split()]
    try:
        empty(torch.empty(1, *shape, device="meta", dtype=empty.dtype))
    except RuntimeError as error:
        raise HfDmsError(
            f"A {type(model).__name__} with this config cannot take an image of {' × '.join(map(str, shape))}, the "
            f"size that its config names (224 × 224 without one): {error}. Correct image_size in the config."
        ) from error
    return found
