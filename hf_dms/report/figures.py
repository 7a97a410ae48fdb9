"""The pictures of a report, drawn once by matplotlib: SVG for `report.html`, PNG files for a paper.

A panel is one picture. The page shows each panel separately, as wide as a phone. A PNG file may hold several panels.
`lines_panel` draws any named lines, so a new plot needs only another call.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .numbers import network_of
from .svg import TITLE, inline

Points = list[tuple[float, float]]
Bands = dict[str, list[tuple[float, float, float]]]

COLOURS = {  # values of the page's CSS variables in light mode; the page defines the dark ones
    **{"c0": "#1f5fbf", "c1": "#b4520a", "c2": "#1a7f4b", "c3": "#8a3fa8", "c4": "#7a6a00", "c5": "#b0244a"},
    **{"soft": "#565d66", "rule": "#d5d9de", "cut": "#dfe3e8"},
}
SERIES = [COLOURS[f"c{number}"] for number in range(6)]
LINES = ("-", "--", ":", "-.")  # lines must differ without colour too
MOST_LINES = 12  # of a panel: a legend of more leaves no room for it
FEW = 12  # lines with fewer points get a marker at each point
SOFT, RULE = COLOURS["soft"], COLOURS["rule"]
# parse_math: names of texts are the user's, and a $ in them begins no formula. fonttype: letters stay text, for the
# page's fonts and for screen readers.
STYLE = {
    **{f"axes.spines.{side}": False for side in ("top", "left", "right")},
    **{"axes.edgecolor": RULE, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.xmargin": 0},
    **{"grid.color": RULE, "grid.linewidth": 0.6, "hatch.linewidth": 0.6, "lines.linewidth": 1.5},
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in (("color", SOFT), ("major.size", 0))},
    **{"axes.labelcolor": SOFT, "text.color": SOFT, "text.parse_math": False, "font.family": "DejaVu Sans"},
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), "medium"),
    **{"legend.frameon": False, "legend.borderpad": 0, "legend.columnspacing": 1.2, "legend.handlelength": 1.8},
    **{"svg.fonttype": "none", "figure.facecolor": "none", "axes.facecolor": "none"},
}


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        name: letters and hyphens, unique among the panels of a page.
        title: a few words.
        summary: its content in a sentence, for readers who cannot see it.
        draw: draws it on axes.
    """

    name: str
    title: str
    summary: str
    draw: Callable[[Axes], None]


# ---- files and pages -------------------------------------------------------------------------------------------------
def write_figures(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw a report as PNG files: `cut.png`, units kept per layer and dim, and `search.png`, the course of the search.

    Args:
        report: the content of `dms_report.json`.
        folder: where the files go; it is made if it is not there.

    Returns:
        The files. There is none for parts that the report lacks, such as the search for a cut by a plan.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    cut, search = cut_panels(report), search_panels(report)
    files = {"cut.png": (cut, 1, (5.5, 1.6)), "search.png": (search, len(search), (2.6, 2.2))}
    found = []
    for name, (panels, columns, size) in files.items():
        if panels:
            found.append(Path(folder, name))
            save(found[-1], panels, columns, size, font_size=8, dpi=300, facecolor="white")
    return found


def svg(panel: Panel) -> str:
    """A panel as an `<svg>` element of a page that defines `COLOURS` as CSS variables; 360 units wide, as a phone."""
    file = io.StringIO()
    save(file, [panel], 1, (5.0, 2.8), font_size=11, format="svg", metadata={"Date": None})
    return inline(file.getvalue(), panel.name, panel.title, panel.summary, COLOURS)


def save(
    file: Any, panels: list[Panel], columns: int, size: tuple[float, float], font_size: float, **options: Any
) -> None:
    """Draw panels side by side. The user's own matplotlibrc has no effect.

    Args:
        file: path or file object.
        panels: what to draw.
        columns: panels in a row.
        size: width and height of a panel in inches.
        font_size: size of all text, in points.
        options: for `Figure.savefig`.
    """
    rows = math.ceil(len(panels) / columns)
    # The salt, like the missing date in `svg`, makes the same report the same bytes.
    with context(["default", STYLE | {"font.size": font_size, "svg.hashsalt": panels[0].name}]):
        # Not by pyplot, which would keep the figure and choose a backend with windows.
        figure = Figure((size[0] * columns, size[1] * rows), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels):
            panel.draw(axes)
        figure.savefig(file, **options)


# ---- kinds of panels -------------------------------------------------------------------------------------------------
def lines_panel(
    name: str,
    title: str,
    labels: tuple[str, str],
    series: dict[str, Points],
    bands: Bands | None = None,
    from_zero: bool = False,
    log: bool = False,
) -> Panel:
    """Named lines.

    Args:
        name, title: see `Panel`.
        labels: labels of the x and the y axis.
        series: name → points (x, y) in order of x. The line has a gap where y is nan.
        bands: name → (x, lowest y, highest y), drawn behind the series of that name.
        from_zero: whether the y axis begins at 0.
        log: whether the y axis is logarithmic.
    """

    def draw(axes: Axes) -> None:
        for number, (label, points) in enumerate(series.items()):
            colour = SERIES[number % len(SERIES)]
            look: dict[str, Any] = {
                "color": colour,
                "clip_on": False,
                "marker": "o" if len(points) < FEW else None,
                "markersize": 3,
            }
            axes.plot(*zip(*points), LINES[number % len(LINES)], label=label, **look)
            if band := (bands or {}).get(label):
                x, low, high = zip(*band)
                axes.fill_between(x, low, high, alpha=0.15, color=colour, linewidth=0)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        _finish(axes, labels, legend=len(series) > 1)

    ends = ", ".join(f"{label} from {_ends(points)}" for label, points in series.items())
    return Panel(name, title, f"{title}: {ends}.", draw)


def bars_panel(dim: str, kept: list[int], units: int, network: str = "dense model") -> Panel:
    """Units kept of a dim, a bar for each layer of the searched network. Dropped layers are hatched bars.

    Args:
        dim: name of the dim.
        kept: units kept per layer, 0 for a dropped layer.
        units: units of each layer before the cut.
        network: name of the searched network, in words.
    """
    stay = [layer for layer, count in enumerate(kept) if count > 0]
    gone = [layer for layer, count in enumerate(kept) if count == 0]
    counts = {layer: f"layer {layer}: {kept[layer]:,} of {units:,} {dim}" for layer in stay}

    def bars(axes: Axes, at: list[int], heights: list[int], words: dict[int, str], **look: Any) -> None:
        for layer, bar in zip(at, axes.bar(at, heights, clip_on=False, **look)):
            bar.set_gid(f"{TITLE}{words.get(layer, f'layer {layer}: dropped')}")

    def draw(axes: Axes) -> None:
        bars(axes, stay, [units] * len(stay), counts, color=COLOURS["cut"], label="cut")
        bars(axes, stay, [kept[layer] for layer in stay], counts, color=COLOURS["c0"], label="kept")
        if gone:
            look = {"facecolor": "none", "edgecolor": COLOURS["c5"], "hatch": "////", "linewidth": 0.6}
            bars(axes, gone, [units] * len(gone), {}, label="layer dropped", **look)
        axes.set(xlim=(-0.6, len(kept) - 0.4), ylim=(0, units))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        # The dense size is a tick itself; another one close below it would overlap its label.
        below = (y for y in MaxNLocator(4, integer=True).tick_values(0, units) if 0 <= y < 0.9 * units)
        axes.set_yticks([*below, units])
        _finish(axes, (f"layer of the {network}", f"{dim} (of {units:,})"), legend=True)

    summary = f"Units of {dim} kept per layer, of {units:,}: {', '.join(map(str, kept))}."
    return Panel(f"cut-{dim}", f"{dim}: units kept in each layer", summary, draw)


def _finish(axes: Axes, labels: tuple[str, str], legend: bool) -> None:
    """Labels, and a legend above. In a column of panels only the outer panels have them."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.6g}")
    place: Any = axes.get_subplotspec()
    axes.set_ylabel(labels[1])
    if place.is_last_row():
        axes.set_xlabel(labels[0])
    if legend and place.is_first_row():
        names = axes.get_legend_handles_labels()[1]
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if len(names) < 4 else 2)


def _ends(points: Points) -> str:
    numbers = [y for _, y in points if math.isfinite(y)]
    return f"{numbers[0]:.4g} to {numbers[-1]:.4g}"


# ---- the panels of a report ------------------------------------------------------------------------------------------
def cut_panels(report: dict[str, Any]) -> list[Panel]:
    """Units kept per layer, a panel for each dim that layers have."""
    network, units = network_of(report.get("recipe")), report["units"]
    return [bars_panel(dim, kept, units[dim], network) for dim, kept in report["sizes"].items() if len(kept) > 1]


def search_panels(report: dict[str, Any]) -> list[Panel]:
    """The course of the search: loss, resource against target, and the mean share of the units kept over the layers,
    with its range. None if the report has no search. Of more than `MOST_LINES` dims, those of a kind share a line.
    """
    logs, units = report.get("search") or [], report.get("units", {})
    dims = [dim for dim in units if logs and f"kept/{dim}" in logs[0]]

    def line(key: str, scale: float = 1.0) -> Points:
        return [(row["step"], math.nan if row.get(key) is None else row[key] * scale) for row in logs]

    def shares(row: dict[str, Any], key: str, names: list[str]) -> list[float]:
        found = [(row.get(f"{key}/{dim}", row.get(f"kept/{dim}")), units[dim]) for dim in names]
        return [math.nan if share is None else share / of for share, of in found]

    kinds: dict[str, list[str]] = {}
    for dim in dims:
        # Dims of stages end in the number of their stage.
        kinds.setdefault(dim.rstrip("0123456789") if len(dims) > MOST_LINES else dim, []).append(dim)
    bands: Bands = {
        kind: [
            (row["step"], min(shares(row, "kept_min", names)), max(shares(row, "kept_max", names)))
            for row in logs
            if len(names) > 1 or f"kept_min/{names[0]}" in row
        ]
        for kind, names in kinds.items()
    }
    loss = {"task loss": line("task_loss")}
    resource = {"resource": line("resource"), "target": line("target")}
    kept = {kind: [(row["step"], fmean(shares(row, "kept", names))) for row in logs] for kind, names in kinds.items()}
    titles = ("Loss", "Resource against target", "Units kept: mean over layers, and the range")
    network = network_of(report.get("recipe"))
    labels = ("task loss", f"share of the {network}'s", f"share of the {network}'s units")
    return [
        lines_panel(f"search-{name}", title, ("step", label), series, bands if series is kept else None, series is kept)
        for name, title, label, series in zip(("loss", "resource", "kept"), titles, labels, (loss, resource, kept))
        if any(math.isfinite(y) for points in series.values() for _, y in points)
    ]
