"""The plan of a cut: which units stay, per dim and layer. It is also a small JSON file for people and other tools."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..archs.bind import BoundSpec
from ..errors import HfDmsError
from ..files import read_json
from ..gating.places import NORMS, scaled_norms

PLAN_FILE = "dms_plan.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Which units stay.

    Attributes:
        kept: per pruned dim one sorted index tensor per row (a row is a layer of the dense model, or the whole model).
        log_scales: θ of learned scales exp θ (`dms.scales`), float32. Under the name of a dim: θ of every kept unit, in
            the shapes of `kept`. Under `norms.DIM`, for the norms over a dim: θ of all units, kept or not, one row per
            norm of the dense model.
    """

    kept: dict[str, tuple[Tensor, ...]]
    log_scales: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Units kept per pruned dim and row."""
        return {name: [len(row) for row in rows] for name, rows in self.kept.items()}


def kept_units(plan: Plan, name: str, layer: int | None, units: int) -> Tensor:
    """Units of a dim that stay in a layer (of the dense model); all of them if the dim is not pruned."""
    if name not in plan.kept:
        return torch.arange(units)
    rows = plan.kept[name]
    # A dim with one row (hidden, layers) keeps the same units wherever it occurs.
    return rows[layer if layer is not None and len(rows) > 1 else 0]


def scales_by_unit(plan: Plan, bound: BoundSpec) -> dict[str, Tensor]:
    """θ of all units of the dims and norms that have scales, `[rows, units]`. Units of a dim that go have θ = 0."""
    found = {}
    for name, rows in plan.log_scales.items():
        if name not in plan.kept:
            found[name] = torch.stack(rows)
            continue
        # θ = 0 is a factor of 1. What is cut away may have any factor.
        found[name] = torch.zeros(len(rows), bound.sizes[name])
        for row, (units, scales) in enumerate(zip(plan.kept[name], rows)):
            found[name][row, units] = scales
    return found


def kept_layers(plan: Plan, bound: BoundSpec) -> list[tuple[str, int]]:
    """Layers of the dense model that stay, in order: (depth dim of their stack, index in it)."""
    return [
        (stack, layer) for stack in bound.stacks for layer in kept_units(plan, stack, None, bound.sizes[stack]).tolist()
    ]


def plan_to_json(plan: Plan, bound: BoundSpec, layout: str) -> str:
    """A plan as JSON text.

    `kept` holds, per pruned dim, one list of indices into the dense model's units per layer. A dim that the whole model
    shares has a single list. `units` holds the number of units of the dense model. Dropped layers have lists too;
    `kept.layers` says which layers stay. `log_scales` holds the scales, if there are any (`packed_scales`).

    Args:
        plan: which units stay.
        bound: the dense model's architecture.
        layout: the checkpoint format, uniform, per_layer or padded.
    """
    kept = {name: [row.tolist() for row in rows] for name, rows in plan.kept.items()}
    units = {name: bound.sizes[name] for name in kept}
    head = {"format": FORMAT, "model_type": bound.spec.model_type, "layout": layout, "units": units}
    # Written by hand, one line per layer: `json.dumps` with an indent would give each index a line of its own.
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in head.items()]
    dims = [f'    "{name}": [\n      ' + ",\n      ".join(map(str, rows)) + "\n    ]" for name, rows in kept.items()]
    if plan.log_scales:
        lines.append(f'  "log_scales": {json.dumps(packed_scales(plan))}')
    return "{\n" + ",\n".join(lines) + ',\n  "kept": {\n' + ",\n".join(dims) + "\n  }\n}\n"


def load_plan(path: str | os.PathLike, bound: BoundSpec) -> tuple[Plan, str]:
    """Read a plan for a dense model.

    Args:
        path: the file, or a folder with `dms_plan.json` in it.
        bound: the dense model's architecture.

    Returns:
        The plan and its layout.

    Raises:
        ValueError: there is no plan, or it belongs to another model; the message names the first mismatch.
    """
    file = Path(path)
    file = file / PLAN_FILE if file.is_dir() else file
    if not file.is_file():
        raise HfDmsError(f"There is no plan '{file}'. A finished `hf-dms prune` leaves one in its output.path.")
    content = read_json(file, "cut", "dms_plan.schema.json")
    check_plan(content, bound, file)
    kept = {name: tuple(torch.tensor(row, dtype=torch.long) for row in rows) for name, rows in content["kept"].items()}
    return Plan(kept, unpacked_scales(content.get("log_scales", {}), kept, bound, file)), content["layout"]


def packed_scales(plan: Plan) -> dict[str, list[str]]:
    """The scales of a plan as text: little-endian float32 in base64, one text per row."""
    # Digits that keep every bit of a float32 would take twice the room.
    return {
        name: [base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii") for row in rows]
        for name, rows in plan.log_scales.items()
    }


def unpacked_scales(
    packed: Mapping[str, Sequence[str]], kept: Mapping[str, Sequence[Any]], bound: BoundSpec, where: object
) -> dict[str, tuple[Tensor, ...]]:
    """Inverse of `packed_scales`.

    Args:
        packed: the texts.
        kept: the units that stay; each has a scale.
        bound: the dense model's architecture.
        where: the file they come from, for messages.

    Raises:
        ValueError: a text is not base64 of one finite number for each unit.
    """
    counts = {name: [len(units) for units in rows] for name, rows in kept.items()}
    for name, paths in scaled_norms(bound).items():
        counts[name] = [bound.sizes[name.removeprefix(NORMS)]] * len(paths)
    found = {}
    for name, rows in packed.items():
        if len(rows) != len(counts.get(name, ())):
            raise HfDmsError(f"{where}: log_scales.{name} has {len(rows)} rows, expected {len(counts.get(name, ()))}.")
        found[name] = tuple(
            _floats(row, count, f"{where}: log_scales.{name}") for row, count in zip(rows, counts[name])
        )
    return found


def _floats(text: str, count: int, where: str) -> Tensor:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HfDmsError(f"{where} is not base64: {error}.") from None
    if len(data) != 4 * count:
        raise HfDmsError(f"{where} has {len(data)} bytes, expected 4 for each of {count} units.")
    # A copy: `frombuffer` gives memory that cannot be written to, and torch warns of it. "<f4" reads little-endian on
    # any machine.
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
    if not values.isfinite().all():
        raise HfDmsError(f"{where} has numbers that are not finite.")
    return values


def check_plan(content: Any, bound: BoundSpec, file: Path) -> None:
    """Check that the content of a plan's file fits a model.

    Raises:
        ValueError: it does not; the message names the first mismatch.
    """
    if content["format"] > FORMAT:
        raise HfDmsError(f"{file} has format {content['format']}, this hf_dms knows up to {FORMAT}. Update hf_dms.")
    if content["model_type"] != bound.spec.model_type:
        raise HfDmsError(f"{file} is for a {content['model_type']} model, this one is a {bound.spec.model_type}.")
    can_be_cut = [dim.name for dim in bound.spec.dims if dim.scope != "fixed"]
    for name, rows in content["kept"].items():
        if name not in can_be_cut:
            dims = ", ".join(can_be_cut)
            raise HfDmsError(f"{file}: {bound.spec.model_type} has no dim '{name}'. Its dims are {dims}.")
        units = bound.sizes[name]
        if content["units"].get(name) != units or len(rows) != bound.rows(name):
            raise HfDmsError(
                f"{file} is for {len(rows)} × {content['units'].get(name)} units of {name}, this model has "
                f"{bound.rows(name)} × {units}. It belongs to another model."
            )
        for row in rows:
            # The schema has checked that rows are not empty and hold distinct whole numbers of at least 0.
            if sorted(row) != row or row[-1] >= units:
                raise HfDmsError(
                    f"{file}: kept.{name} must hold ascending indices from 0 to {units - 1}; got {row[:5]}."
                )
