"""Plans for larger sizes than the target, which a search passes on its way down: one per 5 % of the resource.

All are in one small file. Each unit is one bit in base64, which makes a few kilobytes per plan of a model with
135 million parameters.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..archs.bind import BoundSpec
from ..errors import HfDmsError
from ..files import read_json
from .plan import FORMAT, Plan, check_plan, packed_scales, unpacked_scales

PLANS_FILE = "dms_plans.json"
STEP = 0.05
Plans = dict[float, Plan]  # by the share of the dense resource that each keeps at most


def levels_above(target: float) -> list[float]:
    """The shares of the dense resource above a target at which a plan is kept, in falling order.

    Example:
        >>> levels_above(0.85)
        [0.95, 0.9]
    """
    # Rounded, because 1 - 7 · 0.05 is 0.6499999999999999, and these numbers are keys in files and names of folders.
    # 1e-9, so that a level that differs from the target only by rounding does not count as above it.
    return [level for step in range(1, round(1 / STEP)) if (level := round(1 - step * STEP, 2)) > target + 1e-9]


def plans_to_json(plans: Mapping[float, Plan], bound: BoundSpec, layout: str) -> str:
    """Plans as JSON text.

    Args:
        plans: by share; all have the same dims.
        bound: the dense model's architecture.
        layout: the checkpoint format, uniform, per_layer or padded.
    """
    names = list(next(iter(plans.values())).kept) if plans else []
    head = {
        "format": FORMAT,
        "model_type": bound.spec.model_type,
        "layout": layout,
        "units": {name: bound.sizes[name] for name in names},
    }
    packed = {
        f"{level:g}": {
            name: [_packed(row.tolist(), bound.sizes[name]) for row in plan.kept[name]] for name in names
        }
        for level, plan in sorted(plans.items(), reverse=True)
    }  # fmt: skip
    scales = {f"{level:g}": packed_scales(plan) for level, plan in plans.items() if plan.log_scales}
    return json.dumps(head | {"plans": packed} | ({"log_scales": scales} if scales else {}), indent=1) + "\n"


def load_plans(path: str | os.PathLike, bound: BoundSpec) -> tuple[Plans, str]:
    """Read the plans of a search.

    Args:
        path: the file, or a folder with `dms_plans.json` in it.
        bound: the dense model's architecture.

    Returns:
        The plans by share, and their layout.

    Raises:
        ValueError: there is no such file, or it belongs to another model.
    """
    file = Path(path)
    file = file / PLANS_FILE if file.is_dir() else file
    if not file.is_file():
        raise HfDmsError(f"There is no '{file}'. A search leaves the plans that it passed in its output.path.")
    content = read_json(file, "cut", "dms_plans.schema.json")
    plans: Plans = {}
    for level, dims in content["plans"].items():
        units = content["units"]
        kept = {
            name: [_unpacked(row, units.get(name, 0), f"{file}: plans.{level}.{name}") for row in rows]
            for name, rows in dims.items()
        }
        # The same checks as for a single plan: the sizes and names of the model.
        check_plan({key: content[key] for key in ("format", "model_type", "units")} | {"kept": kept}, bound, file)
        scales = unpacked_scales(content.get("log_scales", {}).get(level, {}), kept, bound, f"{file}: {level}")
        tensors = {name: tuple(torch.tensor(row) for row in rows) for name, rows in kept.items()}
        plans[float(level)] = Plan(tensors, scales)
    return plans, content["layout"]


def load_plan_at(path: str | os.PathLike, bound: BoundSpec, share: float) -> tuple[Plan, str]:
    """Read one of the plans of a search.

    Args:
        path: the file, or a folder with `dms_plans.json` in it.
        bound: the dense model's architecture.
        share: the share of the dense resource that the plan keeps.

    Returns:
        The plan and its layout.

    Raises:
        ValueError: there is no plan at that share; the message lists the shares that have one.
    """
    plans, layout = load_plans(path, bound)
    found = [level for level in plans if math.isclose(level, share, abs_tol=1e-6)]
    if not found:
        there = ", ".join(f"{level:g}" for level in plans) or "none at all"
        raise HfDmsError(f"{path} has no plan at {share:g}. It has {there}.")
    return plans[found[0]], layout


def _packed(kept: list[int], units: int) -> str:
    bits = np.zeros(units, dtype=bool)
    bits[kept] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")


def _unpacked(row: str, units: int, where: str) -> list[int]:
    try:
        data = base64.b64decode(row, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HfDmsError(f"{where} is not base64: {error}.") from None
    # Bits are padded to whole bytes; -(-a // b) is division rounded up.
    if len(data) != -(-units // 8):
        raise HfDmsError(f"{where} has {8 * len(data)} bits for {units} units.")
    kept = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=units).nonzero()[0].tolist()
    if not kept:
        raise HfDmsError(f"{where} keeps no unit.")
    return kept
