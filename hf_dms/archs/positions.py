"""A forward pass of one image without weights, to count MACs: at how many positions each map and convolution runs."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import HfDmsError
from .bind import BoundSpec
from .skeleton import skeleton, without_values


@dataclass(frozen=True)
class Recorded:
    """What a forward pass of one image showed.

    Attributes:
        positions: of every linear map and convolution, by its path: output size for one image / output units.
        macs: multiply-accumulates of every module with all modules inside it, attention scores included, by its path.
            Empty if the architecture has neither `whole` modules nor `attentions`.
    """

    positions: dict[str, int]
    macs: dict[str, float]

    def macs_of(self, path: str) -> float:
        """MACs of a module, or of the modules in a list of them, which never runs itself."""
        if path in self.macs:
            return self.macs[path]
        inside = [name for name in self.macs if name.startswith(f"{path}.")]
        return sum(self.macs[name] for name in inside if not any(name.startswith(f"{other}.") for other in inside))


@torch.no_grad()
def recorded_run(bound: BoundSpec, model: Any) -> Recorded:
    """Record a forward pass on the meta device, which computes shapes only.

    Args:
        bound: the architecture, with the shape of an image.
        model: a model of it; only its class and config are used.

    Raises:
        HfDmsError: the model cannot take an image of the size that its config names.
    """
    found: dict[str, int] = {}

    def record(path: str, module: nn.Linear | nn.Conv2d, args: tuple, output: Tensor) -> None:
        units = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        # A sum, because a module can run several times, as `query_scale` of Conditional DETR does before every layer.
        found[path] = found.get(path, 0) + output.numel() // units

    empty = skeleton(type(model), model.config).eval()
    for path, module in empty.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(functools.partial(record, path))
    shape = [bound.sizes[name] for name in bound.spec.image.split()]
    counter = FlopCounterMode(display=False)
    with contextlib.ExitStack() as stack:
        if counts := bool(bound.spec.whole or bound.spec.attentions):
            empty.set_attn_implementation("eager")  # the counter knows others on some devices only
            stack.enter_context(without_values())
            stack.enter_context(counter)
        try:
            empty(torch.empty(1, *shape, device="meta", dtype=empty.dtype))
        except RuntimeError as error:
            raise HfDmsError(
                f"A {type(model).__name__} with this config cannot take an image of {' × '.join(map(str, shape))}, the "
                f"size that its config names (224 × 224 without one): {error}. Correct image_size in the config."
            ) from error
    root = f"{type(empty).__name__}."  # with which the counter's paths begin
    by_module = counter.get_flop_counts().items() if counts else ()
    # A multiply-accumulate is two of the counter's operations.
    macs = {name.removeprefix(root): sum(of.values()) / 2 for name, of in by_module if name.startswith(root)}
    return Recorded(found, macs)
