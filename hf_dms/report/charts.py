"""Where the lines, bars and labels of the report's pictures are: geometry, which `report.html.jinja` draws as SVG.

A chart is 360 units wide, the width of a phone, so that its labels stay legible there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 10, 34  # margins that hold the labels

Points = list[tuple[float, float]]


@dataclass
class Chart:
    """A picture.

    Attributes:
        title, x_label, y_label: its words.
        summary: what it shows in a sentence, for who cannot see it.
        x_ticks, y_ticks: (place, text).
        series: (name, list of polylines); a gap in the numbers ends one and begins another.
        bands: polygons around series, by name.
        bars: (x, y, width, height, text that is shown over it, class).
    """

    title: str
    x_label: str
    y_label: str
    summary: str
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    series: list[tuple[str, list[str]]] = field(default_factory=list)
    bands: dict[str, list[str]] = field(default_factory=dict)
    bars: list[tuple[float, float, float, float, str, str]] = field(default_factory=list)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: dict[str, Points],
    bands: dict[str, list[tuple[float, float, float]]] | None = None,
    from_zero: bool = False,
) -> Chart:
    """Lines over steps.

    Args:
        title, x_label, y_label: words.
        series: name → points (x, y), in order; a y that is not a finite number is a gap.
        bands: name → (x, lowest y, highest y), drawn behind the series of that name.
        from_zero: whether the y axis begins at 0.
    """
    bands = bands or {}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points if _is_number(y)]
    ys += [y for rows in bands.values() for _, low, high in rows for y in (low, high)]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{_down(y, y_low, y_high):.1f}"

    ends = ", ".join(f"{name} from {_first(points):.4g} to {_last(points):.4g}" for name, points in series.items())
    return Chart(
        title,
        x_label,
        y_label,
        f"{title}: {ends}.",
        x_ticks=[(float(at(x, y_low).split(",")[0]), _number(x)) for x in x_ticks if x_low <= x <= x_high],
        y_ticks=[(_down(y, y_low, y_high), _number(y)) for y in y_ticks],
        series=[
            (name, [" ".join(at(*point) for point in run) for run in _runs(points)]) for name, points in series.items()
        ],
        bands={
            name: [" ".join([*(at(x, high) for x, _, high in rows), *(at(x, low) for x, low, _ in reversed(rows))])]
            for name, rows in bands.items()
        },
    )


def bar_chart(dim: str, kept: list[int], units: int) -> Chart:
    """Units kept of a dim, a bar for each layer of the dense model; a layer that is gone is marked over its height.

    Args:
        dim: its name.
        kept: units kept per layer, 0 where the layer is gone.
        units: units of the dense model's layers.
    """
    step = (WIDTH - LEFT - RIGHT) / len(kept)
    width = max(step * 0.8, 0.6)
    full = _down(units, 0, units)
    bars = []
    for layer, count in enumerate(kept):
        x = LEFT + layer * step + (step - width) / 2
        gone = count == 0
        words = f"layer {layer}: " + ("dropped" if gone else f"{count:,} of {units:,} {dim}")
        bars.append((x, full, width, HEIGHT - BOTTOM - full, words, "gone" if gone else "dense"))
        if not gone:
            y = _down(count, 0, units)
            bars.append((x, y, width, HEIGHT - BOTTOM - y, words, "kept"))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if len(kept) / n <= 8)
    return Chart(
        f"{dim}: units kept in each layer",
        "layer of the dense model",
        f"{dim} (of {units:,})",
        f"Units of {dim} kept per layer, of {units:,}: {', '.join(map(str, kept))}.",
        x_ticks=[(LEFT + (layer + 0.5) * step, str(layer)) for layer in range(0, len(kept), every)],
        y_ticks=[(_down(y, 0, units), _number(y)) for y in _up_to(units)],
        bars=bars,
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover a range, `about` of them or a few more.

    Example:
        >>> ticks(0, 1)
        [0.0, 0.5, 1.0]
    """
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * about >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def _up_to(units: int) -> list[int]:
    """Ticks of whole units from 0, the last of them the number of all units."""
    between = [int(y) for y in ticks(0, units) if y == int(y) and 0 < y < units * 0.9]
    return [0, *between, units]


def _down(y: float, low: float, high: float) -> float:
    return round(HEIGHT - BOTTOM - (y - low) / (high - low or 1) * (HEIGHT - TOP - BOTTOM), 1)


def _runs(points: Points) -> list[Points]:
    runs: list[Points] = [[]]
    for point in points:
        if _is_number(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _first(points: Points) -> float:
    return next((y for _, y in points if _is_number(y)), math.nan)


def _last(points: Points) -> float:
    return _first(points[::-1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


# ---- the course of a search, for report.html and for figures.py ------------------------------------------------------
def course(report: dict[str, Any]) -> dict[str, dict[str, Points]]:
    """The course of the search as lines: `loss`, `resource` (share of the dense one, and its target), `kept` (share of
    the dense units of each dim, mean over layers). Empty if the report has no search.
    """
    logs, units = report.get("search") or [], report.get("units", {})
    if not logs:
        return {}

    def line(key: str, scale: float = 1.0) -> Points:
        return [(row["step"], row[key] * scale if _is_number(row.get(key)) else math.nan) for row in logs]

    dims = [key.removeprefix("kept/") for key in logs[0] if key.startswith("kept/")]
    return {
        "loss": {"task loss": line("task_loss")},
        "resource": {"resource": line("resource"), "target": line("target")},
        "kept": {dim: line(f"kept/{dim}", 1 / units[dim]) for dim in dims if units.get(dim)},
    }


def kept_ranges(report: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Smallest and largest share of the units kept over the layers, (step, low, high) per dim whose layers differ."""
    logs, units = report.get("search") or [], report.get("units", {})
    found: dict[str, list[tuple[float, float, float]]] = {}
    for dim, count in units.items():
        keys = f"kept_min/{dim}", f"kept_max/{dim}"
        rows = [(row["step"], row[keys[0]] / count, row[keys[1]] / count) for row in logs if keys[0] in row]
        if rows:
            found[dim] = rows
    return found
