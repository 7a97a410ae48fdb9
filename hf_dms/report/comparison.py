"""The results of a comparison: quality of every strategy at every budget, and paired differences from the first one.

They are written as numbers (`table.json`), as a Markdown table, and as a plot of quality over budget.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .figures import Panel, Points, lines_panel, save
from .numbers import METRICS, finite, to_json

STAGES = ("cut", "repaired", "recovered")
LINES_OF_PLOT = 8


def comparison_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a comparison, an entry for each target and strategy. Several seeds are averaged.

    Args:
        rows: the rows of `rows.jsonl`.

    Returns:
        Entries with `target`, `strategy`, `seeds` (their number), `seen` (examples of all stages), and, where rows have
        them, `tokens` and `resource` (share kept). `texts` has, per text, the metric of the dense model and of each
        stage that all rows have. Except for the first strategy, it also has the `difference` from the first strategy
        at the same target after the last of these stages, on the same examples and seeds, with `difference_stderr` (in
        nats per token for perplexity, as a share for accuracy). Entries are sorted by target, largest first. At each
        target the first strategy comes first, then the others by quality after the last stage on the first text.
    """
    groups: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["cell"]["target"], row["cell"]["strategy"]].append(row)
    found = []
    for (target, strategy), group in groups.items():
        # Dicts keep their order: the first strategy of a target is the first that the recipe names.
        first = groups[target, next(name for at, name in groups if at == target)]
        entry = {"target": target, "strategy": strategy, "seeds": len(group)}
        entry |= {"seen": round(_mean([sum(row["seen"].values()) for row in group]))}
        for key in ("tokens", "resource"):
            if all(key in row for row in group):
                entry[key] = _mean([row[key] for row in group])
        texts = rows[0]["scores"]["dense"]
        entry["texts"] = {text: _of_text(group, None if group is first else first, text) for text in texts}
        found.append(entry)
    sign = 1 if rows and metric_of(rows) == "perplexity" else -1

    def place(entry: dict[str, Any]) -> tuple[float, bool, float]:
        scores = next(iter(entry["texts"].values()))
        last = next(scores[stage] for stage in reversed(("dense", *STAGES)) if stage in scores)
        # False sorts before True, so the first strategy, which has no difference, comes first.
        return -entry["target"], "difference" in scores, math.inf if math.isnan(last) else sign * last

    return sorted(found, key=place)


def _of_text(group: list[dict], first: list[dict] | None, text: str) -> dict[str, float]:
    metric = metric_of(group)
    stages = [stage for stage in ("dense", *STAGES) if all(stage in row["scores"] for row in group)]
    found = {stage: _mean([row["scores"][stage][text][metric] for row in group]) for stage in stages}
    if first is not None:
        difference, error = paired_difference(group, first, stages[-1], text)
        found |= {"difference": difference, "difference_stderr": error}
    return found


def metric_of(rows: list[dict[str, Any]]) -> str:
    """The metric in the rows: perplexity or accuracy."""
    return next(key for key in METRICS if key in next(iter(rows[0]["scores"]["dense"].values())))


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of `comparison_numbers`, a line for each target and strategy.

    The difference from the first strategy follows the last stage: nats per token for perplexity, points for accuracy.
    """
    if not rows:
        return "No rows yet."
    numbers, metric = comparison_numbers(rows), metric_of(rows)
    texts = list(numbers[0]["texts"])
    stages = [stage for stage in STAGES if any(stage in row["scores"] for row in rows)]
    seen = "tokens" if all("tokens" in entry for entry in numbers) else "seen"
    header = ["target", "strategy", "seeds", seen, *(f"{text}: {' → '.join(('dense', *stages))}" for text in texts)]
    lines = [header, ["---"] * len(header)]
    for entry in numbers:
        cells = [_cell(entry["texts"][text], metric) for text in texts]
        lines.append([f"{entry['target']:g}", entry["strategy"], str(entry["seeds"]), f"{entry[seen]:,.0f}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: dict[str, float], metric: str) -> str:
    number = ",.1f" if metric == "perplexity" else ".4f"
    words = " → ".join(format(values[stage], number) for stage in ("dense", *STAGES) if stage in values)
    if "difference" not in values:
        return words
    scale, unit = (1, "") if metric == "perplexity" else (100, " points")
    difference, error = scale * values["difference"], scale * values["difference_stderr"]
    return f"{words} ({difference:+.3g} ± {error:.2g}{unit})"


def comparison_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Quality after the last stage over the budget, a panel for each text and a line for each of the best strategies.

    Lines are drawn for the first strategy and for those that are best at the smallest target. The table has all.
    """
    numbers, metric = comparison_numbers(rows), metric_of(rows)
    best = [entry["strategy"] for entry in numbers if entry["target"] == numbers[-1]["target"]][:LINES_OF_PLOT]
    panels = []
    for place, text in enumerate(numbers[0]["texts"]):
        series: dict[str, Points] = {name: [] for name in best}
        for entry in reversed(numbers):  # targets rise
            values = entry["texts"][text]
            last = [stage for stage in ("dense", *STAGES) if stage in values][-1]
            if entry["strategy"] in series and math.isfinite(values[last]):
                series[entry["strategy"]].append((entry["target"], values[last]))
        series = {name: points for name, points in series.items() if points}
        labels = ("share of the resource kept", f"{metric}: {text}")
        panels.append(lines_panel(f"quality-{place}", text, labels, series, log=metric == "perplexity"))
    return panels


def write_comparison(rows: list[dict[str, Any]], folder: Path) -> str:
    """Write `table.md`, `table.json` and, if there are rows, `quality.png` into a folder; returns the table."""
    table = comparison_table(rows)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    (folder / "table.json").write_text(to_json(finite(comparison_numbers(rows))), encoding="utf-8")
    if rows:
        panels = comparison_panels(rows)
        save(folder / "quality.png", panels, len(panels), (4.0, 3.4), font_size=8, dpi=200, facecolor="white")
    return table


def paired_difference(group: list[dict], first: list[dict], stage: str, text: str) -> tuple[float, float]:
    """Mean difference of two strategies' scores on the same examples and seeds, and its standard error.

    Args:
        group: rows of one strategy.
        first: rows of the other strategy.
        stage: cut, repaired or recovered.
        text: name of the text.

    Returns:
        Mean and standard error over the examples; nan if the strategies have no seed in common.
    """
    others = {row["cell"]["seed"]: row for row in first}
    pairs = [(row, others[row["cell"]["seed"]]) for row in group if row["cell"]["seed"] in others]
    if not pairs:
        return math.nan, math.nan
    per_example = torch.stack(
        [
            torch.tensor(a["scores"][stage][text]["scores"]) - torch.tensor(b["scores"][stage][text]["scores"])
            for a, b in pairs
        ]
    ).double()
    examples = per_example.mean(0)  # average over seeds first: seeds share their examples, so they are not independent
    return float(examples.mean()), float(examples.std() / math.sqrt(len(examples)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
