"""Rows of a comparison (`rows.jsonl`): reading, appending, and recording what produced them."""

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
    """Rows of earlier runs. A line that a killed run wrote in part, without a row's last braces, is skipped."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}}")]


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Append a row, on its own line even if the last line is incomplete."""
    cut_off = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as rows:
        rows.write(("\n" if cut_off else "") + json.dumps(row) + "\n")


def fingerprint(recipe: Recipe) -> str:
    """A hash of everything that must be equal for rows to be in one table: the recipe without its list of cells."""
    values = _not_default(recipe)
    values.pop("output"), values.pop("hub", None)
    values["compare"] = {key: values["compare"][key] for key in ("tokens", "texts") if key in values["compare"]}
    values["dms"].pop("target")
    for key in ("path", "held_out"):  # only the name counts: the same files may be in another folder
        values["data"] |= {key: Path(str(values["data"][key])).name} if key in values["data"] else {}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _not_default(value: Any) -> Any:
    """The values of a section that differ from their defaults. New options in later versions do not change the hash."""
    if not dataclasses.is_dataclass(value):
        return value
    factories = {f.name: f.default_factory for f in dataclasses.fields(value) if callable(f.default_factory)}
    defaults = {
        f.name: factories[f.name]() if f.name in factories else f.default
        for f in dataclasses.fields(value)
        if f.default is not dataclasses.MISSING or f.name in factories
    }
    found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: _not_default(each) for name, each in found.items() if name not in defaults or each != defaults[name]}


def provenance(device: torch.device) -> dict[str, Any]:
    """The origin of a row: commit of the source if it is a git checkout, versions, machine, threads.

    Args:
        device: the device of the computation; unless it is the CPU, its name goes into `accelerator`.
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
