"""Networks with stages: a description is written once for all stages, and repeated here for each of them.

In any of its texts, `{s}` is the stage, `{s-1}` the stage before it, `{s+1}` and `{s+2}` its number counted from 1 and
from 2, and `{last}` the last stage. An entry of a tuple or a mapping that mentions `{s}` stands for one entry per
stage. An entry that mentions `{s-1}` stands for one entry per stage except the first. So
`Dim("hidden{s}", "hidden_sizes[{s}]")` is one dim per stage, and `"hidden{s} hidden{s-1} two two"` is a convolution
from one stage's width to the next one's. The size of such a dim may be a function of the config and the stage.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from .spec import ArchSpec, Dim

PLACE = re.compile(r"\{(s|s-1|s\+1|s\+2|last)\}")


def in_stages(spec: ArchSpec, count: int) -> ArchSpec:
    """A description with every stage written out. A description without stages is returned unchanged.

    Args:
        spec: the description.
        count: number of stages.
    """
    if spec.stages is None:
        return spec
    written = {
        field.name: _written_out(getattr(spec, field.name), count)
        for field in fields(spec)
        if field.name not in ("stages", "families")
    }
    # A recipe may say `mlp` for all of `mlp0`, `mlp1`, ...
    families = spec.families | {
        dim.name.replace("{s}", ""): tuple(dim.name.replace("{s}", str(stage)) for stage in range(count))
        for dim in spec.dims
        if "{s}" in dim.name
    }
    return replace(spec, **written, stages=None, families=families)


def _written_out(value: Any, count: int) -> Any:
    """A field of a description with its entries repeated and its texts filled in."""
    if isinstance(value, dict):
        return {
            _filled(key, stage, count): _filled(inner, stage, count)
            for key, inner in value.items()
            for stage in _stages((key, inner), count)
        }
    if isinstance(value, tuple):
        return tuple(_filled(entry, stage, count) for entry in value for stage in _stages(entry, count))
    return _filled(value, 0, count)  # a text outside lists belongs to no stage: only `{last}` means something in it


def _stages(entry: Any, count: int) -> range:
    """The stages for which an entry is repeated. Entries of a mapping inside it are repeated separately."""
    places = {place for text in _texts(entry) for place in PLACE.findall(text)}
    # `{last}` alone names one stage, so its entry stands once.
    return range(1 if "s-1" in places else 0, count) if places - {"last"} else range(1)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _texts(entry)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _texts(getattr(value, field.name))


def _filled(value: Any, stage: int, count: int) -> Any:
    """A value with the numbers of a stage filled into all of its texts. A mapping is written out."""
    if isinstance(value, dict):
        return _written_out(value, count)
    if isinstance(value, str):
        numbers = {"s": stage, "s-1": stage - 1, "s+1": stage + 1, "s+2": stage + 2, "last": count - 1}
        return PLACE.sub(lambda place: str(numbers[place[1]]), value)
    if isinstance(value, tuple):
        return tuple(_filled(entry, stage, count) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: _filled(getattr(value, field.name), stage, count) for field in fields(value)}
        # The size of a dim of one stage: its function takes the config alone from here on.
        if isinstance(value, Dim) and "{s}" in value.name and callable(value.size):
            changes["size"] = functools.partial(value.size, stage=stage)
        return replace(value, **changes)
    return value
