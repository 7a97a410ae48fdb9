"""The pictures of a report as PNG files for a paper, by matplotlib (the extra `hf_dms[figures]`).

`cut.png`: units kept per layer and dim, of all; `search.png`: loss, resource against target, units kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HfDmsError
from .charts import course, kept_ranges

DOTS_PER_INCH = 300
STYLES = ("-", "--", ":", "-.")  # so that lines differ without colour too


def write_figures(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw a report.

    Args:
        report: the content of `dms_report.json`.
        folder: where the files go; it is made if it is not there.

    Returns:
        The files; none for what the report does not have, such as the search of a cut by a plan.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise HfDmsError("--figures needs matplotlib: pip install 'hf_dms[figures]'.") from None
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = []
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        for name, draw in (("cut.png", draw_cut), ("search.png", draw_search)):
            figure = Figure(layout="constrained")
            if draw(figure, report):
                figure.savefig(Path(folder, name), dpi=DOTS_PER_INCH)
                found.append(Path(folder, name))
    return found


def draw_cut(figure: Any, report: dict[str, Any]) -> bool:
    """Units kept per layer, a panel for each dim; layers that are gone are hatched. False if no dim has layers."""
    dims = {dim: sizes for dim, sizes in report["sizes"].items() if len(sizes) > 1}
    if not dims:
        return False
    figure.set_size_inches(5.5, 1.5 * len(dims) + 0.3)
    panels = figure.subplots(len(dims), squeeze=False, sharex=True)[:, 0]
    for axes, (dim, kept) in zip(panels, dims.items()):
        units, layers = report["units"][dim], range(len(kept))
        gone = [layer for layer in layers if kept[layer] == 0]
        axes.bar(layers, [units] * len(kept), color="0.88", label="cut")
        axes.bar(layers, kept, color="#1f5fbf", label="kept")
        if gone:
            axes.bar(
                gone, units, color="white", edgecolor="#b0244a", hatch="////", linewidth=0.6, label="layer dropped"
            )
        axes.set_ylabel(f"{dim} (of {units:,})")
        axes.set_ylim(0, units)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    panels[-1].set_xlabel("layer of the dense model")
    return True


def draw_search(figure: Any, report: dict[str, Any]) -> bool:
    """Loss, resource against target and units kept over the steps. False if the report has no search."""
    lines = course(report)
    if not lines:
        return False
    labels = {"loss": "task loss", "resource": "share of the dense resource", "kept": "share of the dense units"}
    shown = [name for name in labels if lines[name]]
    figure.set_size_inches(2.4 * len(shown), 2.1)
    ranges = kept_ranges(report)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for number, (series, points) in enumerate(lines[name].items()):
            axes.plot(*zip(*points), STYLES[number % len(STYLES)], label=series, color=f"C{number}", linewidth=1.2)
            if name == "kept" and series in ranges:
                steps, low, high = zip(*ranges[series])
                axes.fill_between(steps, low, high, alpha=0.15, color=f"C{number}", linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(labels[name])
        if len(lines[name]) > 1:
            axes.legend(frameon=False)
    return True
