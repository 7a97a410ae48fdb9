"""Least squares for the maps of a layer that read the residual stream, where a cut took units of the stream.

The units that stay are correlated with the removed ones, so they carry part of their information. A map that reads them
(`q_proj` or `gate_proj` of a Llama, found from the description) gets the weights that bring its outputs closest to
those that the same map has in the dense model, on the outputs that stay. This is the ridge regression of repair.py,
where R `[positions, outputs]` is the dense output minus the cut one. All positions count equally: the norm in front has
divided by the size of the stream.

Maps with the same inputs (queries, keys and values) share AᵀDA and one ridge. Only linear maps are changed, and none
outside layers (the language model's head).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.bind import BoundSpec
from ..cut.plan import Plan, kept_units
from ..cut.slicing import axis_indices
from .curvature import Sums, positions, widened
from .layerwise import LayerWalk
from .least_squares import HELD_OUT, update_
from .shelf import Shelf
from .stream import Stop, StreamModules, stream_dim


def stream_readers(bound: BoundSpec, stack: str, layer: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The linear maps of a layer that read the stream: path inside the layer → axes of the weight.

    Args:
        bound: the architecture.
        stack: depth dim of the layer's stack.
        layer: the layer's place in it.
    """
    inside, stream = f"{bound.stacks[stack]}.{layer}.", (stream_dim(bound, stack),)
    return {
        name.removeprefix(inside).removesuffix(".weight"): param.axes
        for name, param in bound.params.items()
        if (param.stack, param.layer) == (stack, layer) and name.endswith(".weight")
        if len(param.axes) == 2 and param.axes[1] == stream and param.axes[0] != stream
    }


def readers_of(teacher: LayerWalk, layer: int, plan: Plan) -> Readers | None:
    """The maps of a dense layer that must be refitted; None if its stream is whole, or no linear map reads it.

    Args:
        teacher: the dense model, in front of the layer.
        layer: number of the layer.
        plan: the units that stay.
    """
    bound, (stack, place) = teacher.bound, teacher.places[layer]
    stream = stream_dim(bound, stack)
    whole = len(kept_units(plan, stream, None, bound.sizes[stream])) == bound.sizes[stream]
    return None if whole or not stream_readers(bound, stack, place) else Readers(teacher, layer, plan)


class Readers:
    """The maps of a dense layer that read the stream, with the outputs that a cut keeps of each.

    Attributes:
        fronts: per batch, the dense hidden state in front of the layer.
        outputs: by map, its path inside the layer, the kept outputs `[kept]` int64.

    Args:
        teacher: the dense model, in front of the layer.
        layer: number of the layer.
        plan: the units that stay.
    """

    def __init__(self, teacher: LayerWalk, layer: int, plan: Plan) -> None:
        self.teacher, self.layer = teacher, layer
        self.fronts = Shelf(teacher.offload)
        # The teacher moves on before the student's maps are refitted, so its states in front of the layer are kept.
        for batch in range(len(teacher.hidden)):
            self.fronts.append(teacher.hidden[batch])
        bound, (stack, place) = teacher.bound, teacher.places[layer]
        readers = stream_readers(bound, stack, place)
        self.outputs = {path: axis_indices(axes[0], bound, place, plan) for path, axes in readers.items()}

    def refit_(
        self,
        student: LayerWalk,
        layer: int,
        places: StreamModules,
        before: str,
        masks: Sequence[Tensor | None],
        ridge: float | None,
        where: str,
    ) -> None:
        """Change the maps that run between two writes into the stream.

        Args:
            student: the cut model, in front of the layer.
            layer: number of its layer.
            places: where the layer writes.
            before: path of the map that writes next.
            masks: per batch its attention mask `[batch, tokens]`, None if every position counts.
            ridge: relative to the mean square of the inputs. Default: chosen on held-out batches.
            where: the layer in an error.
        """
        for paths in self._groups(student, layer, places, before):
            modules = [student.layers[layer].get_submodule(path) for path in paths]
            parts = [Sums.of(*modules) for _ in range(min(HELD_OUT, len(masks)))]
            for number, mask in enumerate(masks):
                dense = _heard(self.teacher, self.layer, number, paths, hidden=self.fronts[number])
                cut = _heard(student, layer, number, paths)
                inputs = cut[paths[0]][0]
                counts = positions(mask, inputs)
                if not counts.any():
                    continue
                missing = []
                for path in paths:
                    wanted, found = dense[path][1], cut[path][1]
                    # The dense map has outputs that the cut took away (heads, MLP channels).
                    wanted = wanted.index_select(-1, self.outputs[path].to(wanted.device)).to(found.device)
                    missing.append((widened(wanted) - widened(found))[counts])
                parts[number % len(parts)].add_(inputs[counts], torch.cat(missing, dim=-1))
            update_(modules, parts, ridge, f"{', '.join(paths)} of {where}")

    def _groups(self, student: LayerWalk, layer: int, places: StreamModules, before: str) -> list[list[str]]:
        """The maps that run between the last write and this one, those with the same inputs together."""
        modules: dict[str, Any] = {path: student.layers[layer].get_submodule(path) for path in self.outputs}
        groups: dict[tuple[int, bool], list[str]] = {}
        # A padded cut has outputs of zeros behind the kept ones, which stay as they are.
        readers = [path for path, kept in self.outputs.items() if len(modules[path].weight) == len(kept)]
        heard = _heard(student, layer, 0, [*readers, *places.writes], until=before)
        for path, (inputs, _) in heard.items():  # in the order in which they ran
            if path in places.writes:
                # Maps in front of an earlier write were changed before that write.
                groups = groups if path == before else {}
            else:
                # The same tensor object: queries, keys and values read one output of one norm.
                # Those with a bias apart: it is one more input in the sums.
                key = (id(inputs), modules[path].bias is not None)
                groups.setdefault(key, []).append(path)
        return [*groups.values()]


def _heard(
    walk: LayerWalk,
    layer: int,
    batch: int,
    paths: Sequence[str],
    until: str | None = None,
    hidden: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of maps of a layer in a run that ends after `until`, or after the last of them."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        heard[path] = (args[0], output)
        if path == until or (until is None and len(heard) == len(paths)):
            raise Stop

    modules = ((path, walk.layers[layer].get_submodule(path)) for path in paths)
    hooks = [module.register_forward_hook(functools.partial(listen, path)) for path, module in modules]
    try:
        walk.run(layer, batch, StreamModules(), hidden=hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return heard
