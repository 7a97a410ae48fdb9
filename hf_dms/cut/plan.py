"""The plan of a cut: which units stay, per dim and layer; and the small JSON file that people and tools can read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..archs.bind import BoundSpec
from ..errors import HfDmsError
from ..files import read_json

PLAN_FILE = "dms_plan.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Which units stay.

    Attributes:
        kept: per pruned dim one sorted index tensor per row (layer of the dense model, or the whole model).
    """

    kept: dict[str, tuple[Tensor, ...]]

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Units kept per pruned dim and row."""
        return {name: [len(row) for row in rows] for name, rows in self.kept.items()}


def kept_units(plan: Plan, name: str, layer: int | None, units: int) -> Tensor:
    """Units of a dim that stay in a layer (of the dense model); all of them if the dim is not pruned."""
    if name not in plan.kept:
        return torch.arange(units)
    rows = plan.kept[name]
    return rows[layer if layer is not None and len(rows) > 1 else 0]


def kept_layers(plan: Plan, bound: BoundSpec) -> list[tuple[str, int]]:
    """Layers of the dense model that stay, in order: (depth dim of their stack, index in it)."""
    return [
        (stack, layer) for stack in bound.stacks for layer in kept_units(plan, stack, None, bound.sizes[stack]).tolist()
    ]


def plan_to_json(plan: Plan, bound: BoundSpec, layout: str) -> str:
    """A plan as JSON text.

    `kept` holds, per pruned dim, one list of indices into the dense model's units per layer, or one list in all for a
    dim that the whole model shares; `units` how many the dense model has. Layers that go are in it too: `kept.layers`
    says which stay.

    Args:
        plan: which units stay.
        bound: the dense model's architecture.
        layout: what is written, uniform, per_layer or padded.
    """
    kept = {name: [row.tolist() for row in rows] for name, rows in plan.kept.items()}
    units = {name: bound.sizes[name] for name in kept}
    head = {"format": FORMAT, "model_type": bound.spec.model_type, "layout": layout, "units": units}
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in head.items()]
    dims = [f'    "{name}": [\n      ' + ",\n      ".join(map(str, rows)) + "\n    ]" for name, rows in kept.items()]
    return "{\n" + ",\n".join(lines) + ',\n  "kept": {\n' + ",\n".join(dims) + "\n  }\n}\n"


def load_plan(path: str | os.PathLike, bound: BoundSpec) -> tuple[Plan, str]:
    """Read a plan for a dense model.

    Args:
        path: the file, or a folder with `dms_plan.json` in it.
        bound: the dense model's architecture.

    Returns:
        The plan and its layout.

    Raises:
        ValueError: there is none, or it is one of another model; the first thing that does not fit is named.
    """
    file = Path(path)
    file = file / PLAN_FILE if file.is_dir() else file
    if not file.is_file():
        raise HfDmsError(f"There is no plan '{file}'. A finished `hf-dms prune` leaves one in its output.path.")
    content = read_json(file, "cut", "dms_plan.schema.json")
    check_plan(content, bound, file)
    kept = {name: tuple(torch.tensor(row, dtype=torch.long) for row in rows) for name, rows in content["kept"].items()}
    return Plan(kept), content["layout"]


def check_plan(content: Any, bound: BoundSpec, file: Path) -> None:
    """Check that the content of a plan's file is for a model.

    Raises:
        ValueError: it is not; the first thing that does not fit is named.
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
            if sorted(row) != row or row[-1] >= units:
                raise HfDmsError(
                    f"{file}: kept.{name} must hold ascending indices from 0 to {units - 1}; got {row[:5]}."
                )
