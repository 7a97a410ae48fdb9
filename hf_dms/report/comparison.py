"""The table of a comparison: quality of every strategy at every budget, with paired differences from the first one."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

STAGES = ("cut", "repaired", "recovered")


def comparison_table(rows: list[dict[str, Any]], metric: str) -> str:
    """A Markdown table, a line for each target and strategy; several seeds are averaged.

    Per text: the metric of the dense model, of the cut, and after each stage; behind the last stage the difference from
    the first strategy of the table on the same examples and seeds, with its standard error (nats per token for
    perplexity, points for accuracy).

    Args:
        rows: those of `rows.jsonl`.
        metric: perplexity or accuracy.
    """
    if not rows:
        return "No rows yet."
    groups: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["cell"]["target"], row["cell"]["strategy"]].append(row)
    texts = list(rows[0]["scores"]["dense"])
    stages = [stage for stage in STAGES if any(stage in row["scores"] for row in rows)]
    header = ["target", "strategy", "seeds", "seen", *(f"{text}: {' → '.join(('dense', *stages))}" for text in texts)]
    lines = [header, ["---"] * len(header)]
    for (target, strategy), group in sorted(groups.items(), key=lambda item: -item[0][0]):
        first = groups[target, next(name for at, name in groups if at == target)]
        seen = round(sum(sum(row["seen"].values()) for row in group) / len(group))
        cells = [_cell(group, None if group is first else first, text, stages, metric) for text in texts]
        lines.append([f"{target:g}", strategy, str(len(group)), f"{seen:,}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(group: list[dict], first: list[dict] | None, text: str, stages: list[str], metric: str) -> str:
    number = ".1f" if metric == "perplexity" else ".4f"
    found = [stage for stage in ("dense", *stages) if all(stage in row["scores"] for row in group)]
    shown = [format(_mean([row["scores"][stage][text][metric] for row in group]), number) for stage in found]
    words = " → ".join(shown)
    if first is None:
        return words
    difference, error = paired_difference(group, first, found[-1], text)
    scale, unit = (1, "") if metric == "perplexity" else (100, " points")
    return f"{words} ({scale * difference:+.3g} ± {scale * error:.2g}{unit})"


def paired_difference(group: list[dict], first: list[dict], stage: str, text: str) -> tuple[float, float]:
    """Mean difference of two strategies' scores on the same examples and seeds, and its standard error.

    Args:
        group: rows of one strategy.
        first: rows of the other.
        stage: cut, repaired or recovered.
        text: name of what was measured on.
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
    examples = per_example.mean(0)  # seeds share their examples, so they are no independent draws of these
    return float(examples.mean()), float(examples.std() / math.sqrt(len(examples)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
