"""Batch norms get new running statistics after a cut and after a repair.

During a search, units fade, so the running statistics are a moving average over many different models. After a cut,
and after a repair, means and variances are measured again on data, with the smaller model.

A repair measures them layer by layer. The norms inside a block are measured before its least squares, so that the
solution fits their output. The norm directly behind a repaired map is measured after it, and its weight and bias
compensate for the new statistics. Otherwise this norm would scale the repaired output back to its old spread, and undo
a part of the repair.
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

BATCHES = 64  # statistics are measured on at most this many batches


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a model that keep running statistics. Frozen classes of batch norms do not count."""
    found = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in found if module.track_running_stats]


@torch.no_grad()
def estimate_batch_norms_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Set the running statistics of a model's batch norms to their mean over batches, in place.

    Everything else in the model runs in evaluation mode. A model without batch norms is not changed.

    Args:
        model: the model.
        batches: keyword arguments of forward passes; labels are ignored. All batches should have the same size.

    Raises:
        ValueError: no batches.
    """
    norms = batch_norms(model)
    if not norms:
        return
    device, seen = next(model.parameters()).device, 0
    with evaluating(model), contextlib.ExitStack() as stack:
        for batch in batches:
            # Statistics are reset only once there is a batch, so that no batches means no change.
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
    """Context: running statistics become the plain mean over the batches that pass through the norms."""
    with restoring(norms, "momentum", "training"):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch then takes the plain mean in place of a moving average
            norm.train()
        yield


# ---- in a repair -----------------------------------------------------------------------------------------------------
def estimate_inner_norms_(student: LayerWalk, places: StreamModules, layer: int) -> None:
    """Measure the statistics of a block's batch norms again, except those behind maps that write into the stream.

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
    """Measure the statistics of the batch norm behind a repaired map again, without changing the norm's outputs.

    Its weight and bias are changed so that the norm in evaluation mode stays the same function.

    Args:
        student: the model that is repaired, in front of the layer.
        places: where its layers write.
        layer: the student's layer.
        path: path of the repaired map inside the layer.
    """
    block = student.layers[layer]
    norm: Any = block.get_submodule(places.behind[path]) if path in places.behind else None
    if norm not in batch_norms(block):
        return
    # The norm is y = slope·(x - mean) + bias. With another mean and another slope, a changed weight and bias give the
    # same y.
    slope, mean = batch_norm_slope(norm), norm.running_mean.double().clone()
    with taking_statistics([norm]):
        for batch in range(len(student.hidden)):
            student.run(layer, batch, places, until=path)
    norm.bias += (slope * (norm.running_mean.double() - mean)).to(norm.bias.dtype)
    norm.weight *= (slope / batch_norm_slope(norm)).to(norm.weight.dtype)
