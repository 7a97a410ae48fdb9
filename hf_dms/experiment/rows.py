"""Rows of a comparison: `rows.jsonl`, which work they belong to, and what produced them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..measure.versions import device_name, versions
from .recipe import Recipe


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; a line that was cut off, which does not end with the brace of a row, is left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}}")]


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Write a row behind the others, on a line of its own even where an earlier one was cut off."""
    cut_off = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as rows:
        rows.write(("\n" if cut_off else "") + json.dumps(row) + "\n")


def fingerprint(recipe: Recipe) -> str:
    """What must be the same for rows to stand in one table: all of the recipe but which cells there are."""
    values = _said(recipe)
    values.pop("output"), values.pop("hub", None)
    values["compare"] = {key: values["compare"][key] for key in ("tokens", "texts") if key in values["compare"]}
    values["dms"].pop("target")
    for key in ("path", "held_out"):  # the same files may lie in another folder
        values["data"] |= {key: Path(str(values["data"][key])).name} if key in values["data"] else {}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _said(value: Any) -> Any:
    """What a section says other than its defaults: an option that a later version adds does not change it."""
    if not dataclasses.is_dataclass(value):
        return value
    factories = {f.name: f.default_factory for f in dataclasses.fields(value) if callable(f.default_factory)}
    defaults = {
        f.name: factories[f.name]() if f.name in factories else f.default
        for f in dataclasses.fields(value)
        if f.default is not dataclasses.MISSING or f.name in factories
    }
    found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: _said(each) for name, each in found.items() if name not in defaults or each != defaults[name]}


def provenance(device: torch.device) -> dict[str, Any]:
    """What produced a row: commit of the source, if it is a checkout, versions, machine, threads.

    Args:
        device: what computed; `accelerator` names it, unless it is the CPU.
    """
    folder = Path(__file__).parent
    asked = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    machine = {"processor": device_name("cpu"), "cores": os.cpu_count()}
    machine |= {} if device.type == "cpu" else {"accelerator": device_name(device)}
    return {
        "commit": asked.stdout.strip() or None,
        "versions": versions(),
        "machine": machine | {"threads": torch.get_num_threads()},
    }
