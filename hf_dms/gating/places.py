"""Where the masks and scales of a dim go: modules and axes, derived from the description alone."""

from __future__ import annotations

from collections.abc import Iterator

from ..archs.axes import Axis, terms
from ..archs.bind import BoundParam, BoundSpec, compiled
from ..masked_ops import Span

NORMS = "norms."  # prefix of the names of norms' scales: `norms.hidden` are those of the norms over `hidden`


def masked_inputs(bound: BoundSpec, name: str) -> Iterator[tuple[str, int, Span]]:
    """Linear maps and convolutions that read a dim: (module path, row of its gates, its span along `unit_axis`).

    A map that reads the dim twice, as two parts of its input, is listed twice.
    """
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        # Two axes are those of a linear map, four those of a convolution; both have their inputs on axis 1.
        if leaf == "weight" and len(param.axes) in (2, 4):
            for span in _spans(bound, name, param.axes[1]):
                yield path, _row(bound, name, param), span


def masked_batch_norms(bound: BoundSpec, name: str) -> Iterator[tuple[str, int, Span]]:
    """Batch norms that take the mask of a dim in place of the maps that read it, in the form of `masked_inputs`."""
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and name in param.axes[0] and is_among(bound, path, "masked_batch_norms"):
            for span in _spans(bound, name, param.axes[0]):
                yield path, _row(bound, name, param), span


def _row(bound: BoundSpec, name: str, param: BoundParam) -> int:
    """The row of a dim's gates that a parameter belongs to."""
    return (param.layer or 0) if bound.rows(name) > 1 else 0


def _spans(bound: BoundSpec, name: str, axis: Axis) -> Iterator[Span]:
    """Where a dim is on an axis: nowhere, once, or in several of the products that follow each other."""
    start, length = 0, bound.product(axis) if name in axis else 0
    for term in terms(axis) if name in axis else ():
        end = start + bound.product(term)
        if name in term:
            place = term.index(name)
            # (kv rep d) at `rep`: kv positions before, rep units, d positions after.
            before, after = bound.product(term[:place]), bound.product(term[place + 1 :])
            yield Span(before, bound.sizes[name], after, start, length - end)
        start = end


def unit_axis(bound: BoundSpec, path: str) -> int:
    """The axis of a map's input that holds its units: 1 for a convolution, the last for a linear map."""
    return 1 if len(bound.params[f"{path}.weight"].axes) == 4 else -1


def norms(bound: BoundSpec, name: str) -> Iterator[str]:
    """Paths of the norms over a dim: the modules with a weight vector of that dim, batch norms excepted.

    A batch norm computes statistics of each unit separately, so leaving units out does not change the others. The
    vector may be a product, such as (four hidden) for a norm over the units of four neighbours.
    """
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        in_vector = len(param.axes) == 1 and name in param.axes[0]
        if leaf == "weight" and in_vector and f"{path}.running_mean" not in bound.buffers:
            yield path


def norm_spans(bound: BoundSpec, path: str, name: str) -> list[Span]:
    """Where a dim, by its own or its scales' name, is on the axis of a norm over it."""
    return list(_spans(bound, name.removeprefix(NORMS), bound.params[f"{path}.weight"].axes[0]))


def scaled_norms(bound: BoundSpec) -> dict[str, list[str]]:
    """Paths of the norms that get scales with `scales: norms`, by `norms.DIM` for the norms over a dim.

    Norms over dims that no cut changes have none. Folding a scale into a norm's weight is only right if the norm
    multiplies by that weight, which norms over the width of a head need not do (Gemma multiplies by 1 + weight).
    """
    dims = [dim.name for dim in bound.spec.dims if dim.scope != "fixed"]
    return {f"{NORMS}{name}": paths for name in dims if (paths := list(norms(bound, name)))}


def norm_axis(bound: BoundSpec, norm: str) -> int:
    """The axis of a norm's input that holds its units."""
    return 1 if is_among(bound, norm, "channels_first") else -1


def unnormed(bound: BoundSpec, name: str) -> Iterator[str]:
    """Paths of the modules that write a dim which is then read without a norm."""
    for path in bound.spec.unnormed:
        param = bound.params.get(f"{bound.prefix}{path}.weight")
        if param is not None and param.axes[0] == (name,):
            yield bound.prefix + path


def response_norms(bound: BoundSpec, name: str) -> Iterator[tuple[str, int]]:
    """Modules that divide by a mean over a dim's units: (path, row of its gates)."""
    for parameter, param in bound.params.items():
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and param.axes[-1] == (name,) and is_among(bound, path, "response_norms"):
            yield path, _row(bound, name, param)


def is_among(bound: BoundSpec, path: str, field_name: str) -> bool:
    """Whether a field of the description, a list of patterns, contains a module."""
    patterns = getattr(bound.spec, field_name)
    return any(compiled(pattern).fullmatch(path.removeprefix(bound.prefix)) for pattern in patterns)
