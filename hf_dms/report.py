"""What a prune came to: the numbers of `dms_report.json`, and a table for the terminal and the model card."""

from __future__ import annotations

import platform
from typing import Any

import accelerate
import datasets
import torch
import transformers
from transformers import PreTrainedModel

from . import __version__
from .adapters import base_model_of
from .config import RESOURCES
from .costs import build_cost
from .gates import Gates
from .layouts import Plan, kept_units, written_sizes
from .masking import gates_of
from .resource import Sizes
from .spec import BoundSpec
from .tasks import TASKS

REPORT = "dms_report.json"
ROWS = {  # key of dms_report.json: (words of the table, format)
    "num_params": ("parameters", ",.0f"),
    "macs_per_token": ("MACs per token", ",.0f"),
    "kv_bytes_per_token": ("KV bytes per token", ",.0f"),
    "kept_num_params": ("parameters without padding", ",.0f"),
    "kept_macs_per_token": ("MACs per token without padding", ",.0f"),
    "kept_kv_bytes_per_token": ("KV bytes per token without padding", ",.0f"),
    "perplexity": ("held-out perplexity", ".2f"),
    "accuracy": ("held-out accuracy", ".4f"),
} | {key: (words, ",.0f") for key, words in (task.speed for task in TASKS.values())}


def versions() -> dict[str, str]:
    """Versions of what produced a result."""
    modules = (torch, transformers, accelerate, datasets)
    named = {module.__name__: str(module.__version__) for module in modules}
    return {"hf_dms": __version__, "python": platform.python_version()} | named


def sizes_by_layer(plan: Plan, bound: BoundSpec) -> dict[str, list[int]]:
    """Units that a plan keeps of each dim, per layer of the dense model, 0 where the layer is gone."""
    layers = kept_units(plan, bound.depth, None, bound.num_layers).tolist()
    return {
        name: [units if len(rows) == 1 or layer in layers else 0 for layer, units in enumerate(rows)]
        for name, rows in plan.sizes.items()
    }


def sizes_and_costs(model: PreTrainedModel, plan: Plan, sequence_length: int) -> dict[str, Any]:
    """Exact sizes and costs of the dense model and of the one that `prune` makes of it.

    Args:
        model: a model with gates.
        plan: `plan_of` it.
        sequence_length: tokens per sequence, for the attention scores in the MACs.

    Returns:
        `{"dense": {num_params, macs_per_token, kv_bytes_per_token}, "pruned": {...}, "sizes": {dim: [...]}}`, the last
        as `sizes_by_layer` has it. "pruned" is what is written; for layout padded both
        have also kept_num_params, ...: what is left without the zeros, which is what the target limits.
    """
    model = base_model_of(model)
    gates = gates_of(model)
    bound, config = gates.attachment.bound, gates.attachment.config
    sizes = {name: torch.tensor(units, dtype=torch.float64) for name, units in plan.sizes.items()}
    result: dict[str, Any] = {"dense": {}, "pruned": {}, "sizes": sizes_by_layer(plan, bound)}
    dense = gates.dense_sizes()
    counts = {("dense", ""): dense, ("pruned", ""): _on(gates, dense | sizes)}
    if config.layout == "padded":
        counts |= {(key, "kept_"): at for (key, _), at in counts.items()}
        padded = written_sizes(bound, plan, config.layout, model.config)[0]
        counts["pruned", ""] = {name: torch.full_like(size, padded[name]) for name, size in dense.items()}
    names = {"params": "num_params", "macs": "macs_per_token", "kv_bytes": "kv_bytes_per_token"}
    for resource in RESOURCES:
        if resource == "kv_bytes" and bound.spec.cache is None:
            continue
        cost = build_cost(bound, model, resource, "model", sequence_length)
        for (key, prefix), at in counts.items():
            result[key][prefix + names[resource]] = int(gates.count(at, cost))
    return result


def _on(gates: Gates, sizes: Sizes) -> Sizes:
    return {name: size.to(gates.prune_ratio.device) for name, size in sizes.items()}


def table(report: dict[str, Any]) -> str:
    """Dense against pruned, for the terminal and the model card (a Markdown table)."""
    columns = [name for name in ("dense", "pruned", "repaired", "recovered") if name in report]
    lines = [f"| | {' | '.join(columns)} | {columns[-1]} / dense |", "|---" * (len(columns) + 2) + "|"]
    for key, (words, number) in ROWS.items():
        values = [report[name].get(key, report["pruned"].get(key)) for name in columns]
        if all(value is not None for value in values):
            cells = " | ".join(format(value, number) for value in values)
            change = _points(report[columns[-1]]) if key == "accuracy" else f"{values[-1] / values[0]:.3f}"
            lines.append(f"| {words} | {cells} | {change} |")
    return "\n".join(lines)


def _points(measured: dict[str, Any]) -> str:
    """The paired difference from the dense model, with its standard error, in percentage points."""
    return f"{100 * measured['difference']:+.1f} ± {100 * measured['difference_stderr']:.1f} points"


def sizes_table(sizes: dict[str, list[int]]) -> str:
    """A Markdown table of `sizes_by_layer`."""
    rows = (f"| {dim} | {', '.join(map(str, units))} |" for dim, units in sizes.items())
    return "\n".join(["| dim | units kept |", "|---|---|", *rows])


def loading_lines(auto: str, processor: str | None, model_class: str, path: str) -> str:
    """The lines of Python that load a result.

    Args:
        auto: name of the Auto class.
        processor: name of the Auto class of what prepares its inputs, if that is in the folder.
        model_class: name of its class; that of a per-layer model begins with Dms.
        path: its folder.
    """
    extra = ", trust_remote_code=True)  # or `import hf_dms` first" if model_class.startswith("Dms") else ")"
    lines = [
        f"from transformers import {', '.join(filter(None, (auto, processor)))}",
        f'model = {auto}.from_pretrained("{path}"{extra}',
    ]
    return "\n".join([*lines, f'processor = {processor}.from_pretrained("{path}")'] if processor else lines)
