"""Which runtimes can load a checkpoint: the table in `runtimes.yaml`, and conditions on the sizes in a config.json.

`python -m hf_dms.report.runtimes docs/runtimes.md` renews the table in the docs. `hf-dms report PATH` prints the rows
that apply to a checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

BEGIN = "<!-- renewed by `python -m hf_dms.report.runtimes docs/runtimes.md` -->"
END = "<!-- end of the table of runtimes -->"
TABLE = yaml.safe_load(files(__package__).joinpath("runtimes.yaml").read_text(encoding="utf-8"))
STATUSES: dict[str, str] = TABLE["statuses"]  # status → what it means


@dataclass(frozen=True)
class Row:
    """What one runtime does with models of some types. `runtimes.yaml` explains each field."""

    runtime: str
    version: str
    models: list[str]
    stock: tuple[str, str]
    per_layer: tuple[str, str]
    but: list[str] = field(default_factory=list)
    ignores_head_dim: str | None = None
    order: dict[str, tuple[str, Any, int]] = field(default_factory=dict)

    def model_types(self) -> list[str]:
        """The model types to which this row applies."""
        return [name for name in _in_groups(self.models) if name not in self.but]


@dataclass(frozen=True)
class Verdict:
    """What a runtime does with one checkpoint: a status, one of `STATUSES`, and why."""

    runtime: str
    version: str
    status: str
    words: str


def _in_groups(names: list[str]) -> list[str]:
    """Names with each group replaced by its model types."""
    groups = TABLE["groups"]
    return [inner for name in names for inner in (_in_groups(groups[name]) if name in groups else [name])]


ROWS = [Row(one["name"], one["version"], **row) for one in TABLE["runtimes"] for row in one["rows"]]


# ---- one checkpoint --------------------------------------------------------------------------------------------------
def layout_of(config: dict[str, Any]) -> str:
    """The checkpoint format of a folder, by its config.json: per_layer, or stock (which includes padded)."""
    return "per_layer" if config.get("model_type", "").startswith("dms_") else "stock"


def verdicts(config: dict[str, Any]) -> list[Verdict]:
    """The rows of the table that apply to a checkpoint, adapted to its sizes.

    Args:
        config: the content of its config.json.

    Returns:
        One verdict for each runtime; none for a model type that hf_dms does not know.
    """
    model_type = config.get("model_type", "").removeprefix("dms_")
    found = []
    for row in ROWS:
        if model_type in row.model_types():
            status, words = row.stock if layout_of(config) == "stock" else row.per_layer
            words = row.stock[1] if words == "as for stock" else words
            found.append(_for_sizes(Verdict(row.runtime, row.version, status, words), row, config))
    return found


def _for_sizes(verdict: Verdict, row: Row, config: dict[str, Any]) -> Verdict:
    """A verdict, changed if it depends on the sizes of a checkpoint."""
    if layout_of(config) == "per_layer":
        if row.runtime == "SGLang" and verdict.status == "no" and not _heads_differ(config):
            words = "only MLP widths differ here, which its Transformers backend may take: `--model-impl transformers`"
            return replace(verdict, status="source", words=words)
        return verdict
    heads, head_dim, hidden = (config.get(key) for key in TABLE["sizes"]["heads"])
    if row.ignores_head_dim and heads and head_dim and heads * head_dim != hidden:
        words = f"it assumes hidden size / heads as the head size, {hidden} / {heads} instead of {head_dim}"
        return replace(verdict, status="no", words=f"{words}: {row.ignores_head_dim}")
    if _out_of_order(row, config):
        words = "layers were dropped, and it assumes a fixed order of layers instead of reading the order"
        return replace(verdict, status="no", words=f"{words}: wrong outputs, no error")
    # 256 is the number of weights in a block of llama.cpp's K-quants.
    odd = [f"{key} {config[key]}" for key in TABLE["sizes"]["rows"] if config.get(key, 0) % 256]
    if row.runtime == "llama.cpp" and verdict.status != "no" and odd:
        more = f"K-quants fall back to larger types where rows are not a multiple of 256 ({', '.join(odd)})"
        return replace(verdict, words=f"{verdict.words}; {more}")
    return verdict


def _heads_differ(config: dict[str, Any]) -> bool:
    layers = (config.get("per_layer_config") or {}).values()
    return any(key.endswith("heads") for values in layers for key in values)


def _out_of_order(row: Row, config: dict[str, Any]) -> bool:
    """Whether the kinds of a model's layers do not follow the order that a runtime assumes."""
    key, entry, period = row.order.get(config["model_type"], ("", None, 1))
    return any((kind == entry) != ((layer + 1) % period == 0) for layer, kind in enumerate(config.get(key) or []))


# ---- the table in the documentation ----------------------------------------------------------------------------------
def runtimes_table() -> str:
    """The table in the documentation."""
    lines: list[tuple[str, ...]] = [("runtime", "version", "models", "stock, padded", "per-layer"), ("---",) * 5]
    for row in ROWS:
        models = _named(row.models) + (f" but {_named(row.but)}" if row.but else "")
        cells = (f"{_mark(status)}: {words}" for status, words in (row.stock, row.per_layer))
        lines.append((row.runtime, row.version, models, *cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _named(names: list[str]) -> str:
    return ", ".join(name if name in TABLE["groups"] else f"`{name}`" for name in names)


def _mark(status: str) -> str:
    return {"run": "**run**", "source": "read", "unknown": "?"}.get(status, status)


def renewed(text: str) -> str:
    """A text with its table of runtimes, between `BEGIN` and `END`, replaced by the current one."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{runtimes_table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
