"""Running statistics of batch norms, taken anew: those of a cut model are not the ones that it was cut with.

During a search batch norms see units fade; what they remember is a moving average over many models. After a cut, and
after a repair, their means and variances are those of the smaller model on data.

A repair takes them layer by layer. The norms inside a block come before its least squares, which thus solve for what
they give. The norm behind a map that is repaired comes after it, and its weight and bias make up for the change: else
it would scale what least squares found back to the spread that the dense model's output has, and undo a part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.restoring import evaluating, restoring
from ..errors import HfDmsError
from .layerwise import LayerWalk
from .stream import StreamModules, batch_norm_slope

BATCHES = 64  # that statistics are taken from, where there is more data


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a model that keep running statistics; those that are frozen by their class are none."""
    found = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in found if module.track_running_stats]


@torch.no_grad()
def estimate_batch_norms_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Set the running statistics of a model's batch norms to the mean of those of batches, in place.

    Everything else of the model runs in evaluation mode meanwhile. A model without batch norms is left as it is.

    Args:
        model: the model.
        batches: keyword arguments of forward passes; labels are left out. Batches of one size, as in training.

    Raises:
        ValueError: no batches.
    """
    norms = batch_norms(model)
    if not norms:
        return
    device, seen = next(model.parameters()).device, 0
    with evaluating(model), contextlib.ExitStack() as stack:
        for batch in batches:
            if not seen:
                stack.enter_context(taking_statistics(norms))
            model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
            seen += 1
    if not seen:
        raise HfDmsError(
            "estimate_batch_norms_ needs at least one batch, got none. The statistics were left as they are."
        )


@contextlib.contextmanager
def taking_statistics(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Let running statistics become the plain mean over the batches that pass while it lasts."""
    with restoring(norms, "momentum", "training"):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield


# ---- in a repair -----------------------------------------------------------------------------------------------------
def estimate_inner_norms_(student: LayerWalk, places: StreamModules, layer: int) -> None:
    """Take the statistics of a block's batch norms anew, but those behind maps that write into the stream.

    Args:
        student: the model that is repaired, in front of the layer.
        places: where its layers write.
        layer: the student's.
    """
    block = student.layers[layer]
    outer = [block.get_submodule(path) for path in places.behind.values()]
    inner = [norm for norm in batch_norms(block) if norm not in outer]
    with taking_statistics(inner):
        for batch in range(len(student.hidden) if inner else 0):
            student.run(layer, batch, StreamModules())


def estimate_outer_norm_(student: LayerWalk, places: StreamModules, layer: int, path: str) -> None:
    """Take the statistics of the batch norm behind a map that writes into the stream anew, its outputs unchanged.

    Args:
        student: the model that is repaired, in front of the layer.
        places: where its layers write.
        layer: the student's.
        path: of the map, which has been repaired.
    """
    block = student.layers[layer]
    norm: Any = block.get_submodule(places.behind[path]) if path in places.behind else None
    if norm not in batch_norms(block):
        return
    slope, mean = batch_norm_slope(norm), norm.running_mean.double().clone()
    with taking_statistics([norm]):
        for batch in range(len(student.hidden)):
            student.run(layer, batch, places, until=path)
    norm.bias += (slope * (norm.running_mean.double() - mean)).to(norm.bias.dtype)
    norm.weight *= (slope / batch_norm_slope(norm)).to(norm.weight.dtype)
