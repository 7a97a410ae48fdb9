"""The results of a prune: the numbers of `dms_report.json`, and a table for the terminal and the model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..archs.bind import BoundSpec
from ..archs.costs import build_cost
from ..archs.plain_view import base_model_of
from ..archs.stock import widest
from ..config import RESOURCES
from ..cut.formats import written_sizes
from ..cut.modeling_dms import AUTO_CLASSES
from ..cut.plan import Plan, kept_layers
from ..gates import Gates
from ..gating.attach import gates_of
from ..resource import Sizes
from ..tasks.registry import TASKS, task_of_class
from .report import FORMAT, Report

REPORT = "dms_report.json"
METRICS = {  # of a task: (words, format in a table, format in a sentence, unit of a difference)
    "perplexity": ("perplexity", ".2f", ".2f", "nats per token"),
    "accuracy": ("accuracy", ".4f", ".1%", "of the accuracy"),
    "mean_average_precision": ("mAP", ".4f", ".1%", "of the mAP"),
}
COSTS = {"params": "num_params", "macs": "macs_per_token", "kv_bytes": "kv_bytes_per_token"}  # by resource
MACS = ("macs_per_token", "kept_macs_per_token")
PARTED = 1.5  # by how much more perplexity may grow on another text before a run warns
BARS = "▁▂▃▄▅▆▇█"
ROWS = (
    {  # key of dms_report.json: (words of the table, format)
        "num_params": ("parameters", ",.0f"),
        "macs_per_token": ("MACs per token", ",.0f"),
        "kv_bytes_per_token": ("KV bytes per token", ",.0f"),
        "kept_num_params": ("parameters without padding", ",.0f"),
        "kept_macs_per_token": ("MACs per token without padding", ",.0f"),
        "kept_kv_bytes_per_token": ("KV bytes per token without padding", ",.0f"),
    }
    | {metric: (f"held-out {words}", number) for metric, (words, number, *_) in METRICS.items()}
    | {key: (words, ",.0f") for key, words in (task.speed for task in TASKS.values())}
)


def sizes_by_layer(plan: Plan, bound: BoundSpec) -> dict[str, list[int]]:
    """Units that a plan keeps of each dim, per layer of the dense model, 0 where the layer is gone."""
    kept = kept_layers(plan, bound)
    return {
        name: [
            units if len(rows) == 1 or (bound.stack_of(name), layer) in kept else 0 for layer, units in enumerate(rows)
        ]
        for name, rows in plan.sizes.items()
    }


def shape(plan: Plan, bound: BoundSpec) -> dict[str, Any]:
    """The shape of the cut model, and of the dense one.

    Returns:
        `sizes`, see `sizes_by_layer`; `units`, the number of units of each dim in the dense model; `kept_layers`, the
        indices of the dense model's layers that stay, counted through all stacks.
    """
    layers = [(stack, layer) for stack in bound.stacks for layer in range(bound.sizes[stack])]
    kept = kept_layers(plan, bound)
    return {
        "sizes": sizes_by_layer(plan, bound),
        "units": {name: bound.sizes[name] for name in plan.kept},
        "kept_layers": [index for index, layer in enumerate(layers) if layer in kept],
    }


def sizes_and_costs(model: PreTrainedModel, plan: Plan, sequence_length: int) -> dict[str, Any]:
    """Exact sizes and costs of the dense model and of its cut.

    Args:
        model: a model with gates.
        plan: which of its units stay.
        sequence_length: tokens per sequence, for the attention scores in the MACs.

    Returns:
        `{"dense": {num_params, macs_per_token, kv_bytes_per_token}, "pruned": {...}}` and what `shape` returns; for a
        network in which an image counts as one token `macs_per: "image"`.
        "pruned" counts what is written. For layout padded both also have kept_num_params, ...: the counts without the
        zeros, which the target limits.
    """
    model = base_model_of(model)
    gates = gates_of(model)
    bound, config = gates.attachment.bound, gates.attachment.config
    sizes = {name: torch.tensor(units, dtype=torch.float64) for name, units in plan.sizes.items()}
    result: dict[str, Any] = {"dense": {}, "pruned": {}} | shape(plan, bound)
    if bound.spec.tokens == "one":
        result["macs_per"] = "image"
    dense = gates.dense_sizes()
    counts = {("dense", ""): dense, ("pruned", ""): _on(gates, dense | sizes)}
    if config.layout == "padded":
        counts |= {(key, "kept_"): at for (key, _), at in counts.items()}
        padded = widest(written_sizes(bound, plan, config.layout, model.config))  # each layer has its stack's dims only
        counts["pruned", ""] = {name: torch.full_like(size, padded[name]) for name, size in dense.items()}
    for resource in RESOURCES:
        if resource == "kv_bytes" and bound.spec.cache is None:
            continue
        cost = build_cost(bound, model, resource, "model", sequence_length)
        for (key, prefix), at in counts.items():
            result[key][prefix + COSTS[resource]] = int(gates.count(at, cost))
    return result


def _on(gates: Gates, sizes: Sizes) -> Sizes:
    return {name: size.to(gates.prune_ratio.device) for name, size in sizes.items()}


# ---- the file --------------------------------------------------------------------------------------------------------
def as_written(report: Report | dict[str, Any]) -> dict[str, Any]:
    """A report as `dms_report.json` has it.

    Numbers that are not finite are None, because JSON has no such numbers. This machine's folders are left out, because
    the file is pushed with the model.

    Args:
        report: the report, or the keys of one.
    """
    written = {"format": FORMAT} | (report.values() if isinstance(report, Report) else report)
    for section in ("model", "recipe"):
        if section in written:
            written[section] = without_local_paths(written[section])
    return finite(written)


def to_json(written: Any) -> str:
    """The text of a JSON file of finite values, as `as_written` returns them for `dms_report.json`."""
    return json.dumps(written, indent=2, allow_nan=False) + "\n"


def without_local_paths(values: Any, key: str = "") -> Any:
    """A recipe in which local paths are shortened to their last part, `.../name`, which cannot be a Hub id.

    Args:
        values: the recipe, a section or a value of it.
        key: the value's name. A `prompt` stays as it is.
    """
    if isinstance(values, dict):
        if key == "mix":  # weights by path
            return {without_local_paths(path, "path"): weight for path, weight in values.items()}
        return {name: value if name == "prompt" else without_local_paths(value, name) for name, value in values.items()}
    if not isinstance(values, str) or not values:
        return values
    # A bare word, such as the name of a strategy, can by chance be a folder's name too.
    may_be = key in ("path", "held_out") or "/" in values or "\\" in values
    absolute = Path(values).is_absolute() or values.startswith("~")
    local = absolute or (may_be and Path(values).exists())
    return f".../{Path(values).name}" if local else values


def finite(value: Any) -> Any:
    """A value as JSON can have it: numbers that are not finite are None, tuples are lists."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- tables and lines for people -------------------------------------------------------------------------------------
def heading(report: dict[str, Any], name: str) -> str:
    """The heading of a model's column: "dense" is "supernet" or "random" if it is not a trained model."""
    return network_of(report.get("recipe")).removesuffix(" model") if name == "dense" else name


def network_of(recipe: dict[str, Any] | None) -> str:
    """The name of the network that a search begins with: dense model, random model or supernet.

    Args:
        recipe: the recipe as plain values; None for a cut by a plan.
    """
    recipe = recipe or {}
    if recipe.get("model", {}).get("supernet"):
        return "supernet"
    untrained = recipe.get("dms", {}).get("pipeline") == "np" and not recipe.get("finetune")
    return "random model" if untrained else "dense model"


def notes(report: dict[str, Any]) -> list[str]:
    """Sentences beside the table: a supernet's original, a search off its target, texts that lost more than others."""
    found = [_beside_the_original(report)] if "original" in report else []
    found += [report["outcome"]["message"]] if report.get("outcome", {}).get("message") else []
    return found + _parted_texts(report)


def _beside_the_original(report: dict[str, Any]) -> str:
    """A supernet's result against the model that its target counts against."""
    original, pruned = report["original"], report["pruned"]
    shares = [
        f"{original[key]:,.0f} {row_words(report, key)} (the result: {pruned[key] / original[key]:.3f} of them)"
        for key in COSTS.values()
        if original.get(key)
    ]
    return f"The original model, which the target counts against, has {' and '.join(shares)}."


def columns_of(report: dict[str, Any]) -> list[str]:
    """The models that a report measured, in order."""
    return [name for name in ("dense", "pruned", "repaired", "recovered") if name in report]


def measured_columns(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The columns of the table: heading → numbers of a model, or of the soft masks that a search ended with.

    Only the quality on soft masks is measured. That of the pruned model differs by the cost of rounding.
    """
    columns = [(heading(report, name), report[name]) for name in columns_of(report)]
    if "masks" in report:
        columns.insert(1, ("soft masks", report["masks"]["soft"]))
    return dict(columns)


def row_words(report: dict[str, Any], key: str) -> str:
    """What the table calls a number of `ROWS`: MACs are those of a token, or of a whole image."""
    words = ROWS[key][0]
    return words.replace("token", report.get("macs_per", "token")) if key in MACS else words


def table_rows(report: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    """Dense against pruned: (words, what each of `measured_columns` has, the last model against the dense one)."""
    columns = columns_of(report)
    rows = []

    def add_row(words: str, key: str, number: str, values: list[Any], measured: dict[str, Any], soft: Any) -> None:
        cells = [format(value, number) for value in values]
        if "masks" in report:
            cells.insert(1, "" if soft is None else format(soft, number))
        # Accuracies are compared by their difference in points, everything else by a ratio.
        change = _points(measured) if key in METRICS and key != "perplexity" else f"{values[-1] / values[0]:.3f}"
        rows.append((words, cells, change))

    for key, (_, number) in ROWS.items():
        values = [report[name].get(key, report["pruned"].get(key)) for name in columns]
        if any(value is None for value in values):
            continue
        soft = report["masks"]["soft"].get(key) if "masks" in report else None
        add_row(row_words(report, key), key, number, values, report[columns[-1]], soft)
        for text, measured in report.get("texts", {}).items() if key in METRICS else ():
            there = [measured[name][key] for name in columns]
            add_row(f"{METRICS[key][0]} on {text}", key, number, there, measured[columns[-1]], None)
    return rows


def _parted_texts(report: dict[str, Any]) -> list[str]:
    """A sentence for each further text on which the last model lost much more than on the held-out data."""
    last = columns_of(report)[-1]
    found: list[str] = []
    for text, measured in report.get("texts", {}).items():
        here, there = (each[last].get("perplexity") for each in (report, measured))
        if here is None or there is None:
            continue
        here, there = here / report["dense"]["perplexity"], there / measured["dense"]["perplexity"]
        if there > PARTED * here:
            found.append(
                f"The {last} model has {there:.2f} times the {heading(report, 'dense')} perplexity on {text}, and "
                f"{here:.2f} times on the held-out data: it was fitted to its calibration text. Mix others into that, "
                "as data.mix: {self: 1}."
            )
    return found


def report_table(report: dict[str, Any]) -> str:
    """Dense against pruned, for the terminal and the model card (a Markdown table)."""
    columns = [*measured_columns(report)]
    lines = [f"| | {' | '.join(columns)} | {columns[-1]} / {columns[0]} |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {words} | {' | '.join(cells)} | {change} |" for words, cells, change in table_rows(report)]
    return "\n".join(lines)


def _points(measured: dict[str, Any]) -> str:
    """The paired difference from the dense model, with its standard error if it has one, in percentage points."""
    difference, error = measured["difference"], measured["difference_stderr"]
    return f"{100 * difference:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " points"


def sizes_table(sizes: dict[str, list[int]]) -> str:
    """A Markdown table of `sizes_by_layer`."""
    rows = (f"| {dim} | {', '.join(map(str, units))} |" for dim, units in sizes.items())
    return "\n".join(["| dim | units kept |", "|---|---|", *rows])


def size_bars(report: dict[str, Any]) -> str:
    """The widths of the layers as bars for the terminal: a line per dim, a column per layer of the dense model.

    A full column keeps all units; a blank one is a layer that is gone. Dims of the whole model follow as numbers.
    """
    sizes, units = report["sizes"], report["units"]
    wide = {dim: kept for dim, kept in sizes.items() if len(kept) > 1}
    lines = []
    for dim, kept in wide.items():
        # Rounded up, so that a layer that is there is never blank.
        levels = (math.ceil(len(BARS) * size / units[dim]) for size in kept)
        bars = "".join(BARS[level - 1] if level else " " for level in levels)
        low, high = min(filter(None, kept), default=0), max(kept)
        lines.append(f"{dim:>8} {bars}  {low}{f' to {high}' if high > low else ''} of {units[dim]}")
    whole = [f"{dim} {kept[0]} of {units[dim]}" for dim, kept in sizes.items() if dim not in wide]
    return "\n".join([*lines, *([f"{'whole':>8} {', '.join(whole)}"] if whole else [])])


def loading_lines(model_class: str, path: str) -> str:
    """The lines of Python that load a result and what prepares its inputs.

    Args:
        model_class: name of its class; that of a per-layer model begins with Dms.
        path: its folder or Hub id.
    """
    if task := task_of_class(model_class):
        auto, processor = task.model_class, task.processor_class
    else:
        auto, processor = f"AutoModelFor{model_class.rpartition('For')[2]}", None
        auto = auto if auto in AUTO_CLASSES else "AutoModel"
    extra = ", trust_remote_code=True)  # or `import hf_dms` first" if model_class.startswith("Dms") else ")"
    lines = [
        f"from transformers import {', '.join(filter(None, (auto, processor)))}",
        f'model = {auto}.from_pretrained("{path}"{extra}',
    ]
    return "\n".join([*lines, f'processor = {processor}.from_pretrained("{path}")'] if processor else lines)
