"""Reconstruction of a sub-block: all its maps learn together to bring the stream closest to the dense model's.

Least squares (repair.py) changes only the last map of a sub-block. Here the maps in front of it (gate and up of an MLP;
q, k and v of an attention) learn too, by Adam, on the mean over positions of

    |S − S_dense|² / |S_dense|²,

where S is the stream after the sub-block. As in repair.py, each position counts relative to the dense stream there, or
all positions count equally where no norm over units reads the stream. Training needs no labels, the gradients of one
layer, and no forward pass of the whole model. A quarter of the batches is held out. After each pass over the others the
held-out error is measured, and the best weights are kept, the least-squares solution included. So the held-out error is
never worse than that of least squares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .curvature import position_weights, positions, widened
from .layerwise import LayerWalk
from .shelf import Shelf
from .stream import StreamModules

RATE = 0.01  # Adam's learning rate at the start, relative to the root mean square of each matrix; it falls to 0
BETAS = (0.9, 0.95)
HELD_OUT = 4  # one batch in this many is held out, and at least one


def reconstruct_(
    student: LayerWalk,
    places: StreamModules,
    layer: int,
    path: str,
    targets: Shelf,
    masks: Sequence[Tensor | None],
    epochs: int,
) -> None:
    """Train the sub-block that ends in a map which writes into the stream, in place.

    Args:
        student: the model that is repaired, in front of the layer.
        places: where its layers write.
        layer: the student's layer.
        path: path of the map inside the layer.
        targets: per batch, the stream that is wanted after the map, `[..., hidden]`.
        masks: per batch its attention mask `[batch, tokens]`, None if every position counts. At least two batches.
        epochs: passes over the batches.
    """
    weights = sub_block(student, places, layer, path)
    held_out = range(HELD_OUT - 1, len(masks), HELD_OUT) if len(masks) >= HELD_OUT else range(1)
    trained = [number for number in range(len(masks)) if number not in held_out]
    copies = [widened(weight.detach()).clone() for weight in weights]  # steps are too small for half precision
    # Adam's step has the size of its rate whatever the gradient, so a rate must be in proportion to the weights.
    groups = [{"params": [copy], "lr": RATE * float(copy.square().mean().sqrt())} for copy in copies]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(trained))
    order = torch.Generator().manual_seed(0)  # of its own, so that the same batches give the same repair

    def error(number: int) -> Tensor:
        found = student.run(layer, number, places, until=path).sums[path]
        target = targets[number].to(found.device)
        counts = positions(masks[number], target)
        aim = widened(target[counts])
        weights = position_weights(aim, places.relative)
        return (weights * (widened(found[counts]) - aim).square().mean(-1)).mean()

    def held_out_error() -> float:
        return float(torch.stack([error(number) for number in held_out]).mean())

    def as_they_are() -> list[Tensor]:
        return [weight.detach().clone() for weight in weights]

    # The least-squares solution is the first candidate, so training can only improve on it.
    least, best = held_out_error(), as_they_are()
    for _ in range(epochs):
        for place in torch.randperm(len(trained), generator=order).tolist():
            with learning(weights):
                gradients = torch.autograd.grad(error(trained[place]), weights)
            for copy, gradient in zip(copies, gradients):
                copy.grad = widened(gradient)
            optimizer.step()
            schedule.step()
            for weight, copy in zip(weights, copies):
                weight.copy_(copy)  # rounded to the layer's precision; the copies gather steps below its resolution
        if (now := held_out_error()) < least:
            least, best = now, as_they_are()
    for weight, value in zip(weights, best):
        weight.copy_(value)


def sub_block(student: LayerWalk, places: StreamModules, layer: int, path: str) -> list[nn.Parameter]:
    """The matrices and kernels of a layer that one map's output depends on, and no earlier map's output.

    They are found from gradients: an output has a gradient in exactly the weights that it depends on.
    """
    matrices = [weight for weight in student.layers[layer].parameters() if weight.dim() in (2, 4)]
    with learning(matrices):
        # What earlier maps of the layer wrote, and what this one writes.
        *before, written = student.run(layer, 0, places, until=path).added.values()
        outputs = [output.square().sum() for output in (*before, written)]
        # `allow_unused`: None for a weight that an output does not depend on, which is what is asked.
        gradients = [torch.autograd.grad(output, matrices, retain_graph=True, allow_unused=True) for output in outputs]
    reached = [[gradient is not None for gradient in of_matrix] for of_matrix in zip(*gradients)]
    return [weight for weight, (*earlier, now) in zip(matrices, reached) if now and not any(earlier)]


@contextlib.contextmanager
def learning(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context: weights require gradients, and autograd is on."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before):
            weight.requires_grad_(required)
