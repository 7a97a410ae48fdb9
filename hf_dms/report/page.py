"""`report.html`: one file that opens offline and shows a prune, made from the content of `dms_report.json`.

Jinja2 fills `report.html.jinja` and escapes every value except the pictures, which `figures.py` escapes. The page has
no script and loads nothing, and its content security policy forbids both.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils import CONFIG_NAME

from ..errors import HfDmsError
from ..files import read_json
from ..tasks.registry import TASKS
from .card import source_of
from .figures import COLOURS, cut_panels, search_panels, svg, write_figures
from .numbers import (
    METRICS,
    REPORT,
    columns_of,
    heading,
    loading_lines,
    measured_columns,
    network_of,
    notes,
    report_table,
    size_bars,
    sizes_table,
    table_rows,
)
from .runtimes import STATUSES, layout_of, verdicts

PAGE = "report.html"
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("hf_dms.report", ""),
    autoescape=True,
    # A key that the report lacks is an error, not an empty place on the page.
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals.update(svg=svg, colours=COLOURS)


def render(report: dict[str, Any], config: dict[str, Any], name: str) -> str:
    """The page as HTML.

    Args:
        report: the content of `dms_report.json`.
        config: the content of the pruned model's `config.json`.
        name: name of the model.
    """
    recipe = report.get("recipe")
    return TEMPLATES.get_template("report.html.jinja").render(
        name=name,
        report=report,
        source=source_of(report),
        tiles=tiles(report),
        columns=[*measured_columns(report)],
        network=network_of(recipe),
        heading=lambda column: heading(report, column),
        notes=notes(report),
        rows=table_rows(report),
        errors=standard_errors(report),
        whole_model=[
            (dim, units[0], report["units"][dim]) for dim, units in report["sizes"].items() if len(units) == 1
        ],
        cut=cut_panels(report),
        search=search_panels(report),
        samples=report.get("samples") or [],
        verdicts=verdicts(config),
        statuses=STATUSES,
        layout=layout_of(config),
        loading=loading_lines(report["model_class"], name),
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False) if recipe else None,
    )


def tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The main results as pairs of (label, value)."""
    dense, pruned, last = report["dense"], report["pruned"], report[columns_of(report)[-1]]
    shares = {
        "num_params": "of the parameters",
        "macs_per_token": "of the MACs",
        "kv_bytes_per_token": "of the KV cache",
    }
    if (original := report.get("original")) is not None:  # shares of the original; the supernet is no baseline
        own = {key: f"of the original's {words.removeprefix('of the ')}" for key, words in shares.items()}
        found = [(words, f"{pruned[key] / original[key]:.1%}") for key, words in own.items() if original.get(key)]
        task = TASKS[report["recipe"]["model"]["task"]]
        metric, _, number, _ = METRICS[task.metric]
        return found + ([] if last.get(task.metric) is None else [(metric, f"{last[task.metric]:{number}}")])
    found = [(words, f"{pruned[key] / dense[key]:.1%}") for key, words in shares.items() if pruned.get(key)]
    for metric, (words, _, number, _) in METRICS.items():
        if last.get(metric) is not None and dense.get(metric) is not None:
            found.append((words, f"{dense[metric]:{number}} → {last[metric]:{number}}"))
    for key, words in dict(task.speed for task in TASKS.values()).items():
        if pruned.get(key) and dense.get(key):
            found.append((words, f"× {pruned[key] / dense[key]:.2f}"))
    return found


def standard_errors(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Per model its metric and its paired difference from the dense model, both with standard errors."""
    lines = []
    for name, measured in measured_columns(report).items():
        metric = next((metric for metric in METRICS if measured.get(metric) is not None), None)
        if metric is None:
            continue
        named, _, _, unit = METRICS[metric]
        words = f"{named} {measured[metric]:.4g}{_plus_minus(measured.get('stderr'))}"
        if measured.get("difference") is not None:
            words += f"; difference {measured['difference']:+.4f}{_plus_minus(measured['difference_stderr'])} {unit}"
        lines.append((name, words))
    return lines


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2g}"


# ---- `hf-dms report` -------------------------------------------------------------------------------------------------
def as_data(path: str) -> dict[str, Any]:
    """The content of `show` for programs: the report (None if there is none), and the verdicts of the runtimes."""
    report, config = read(path)
    return {"report": report, "runtimes": [asdict(verdict) for verdict in verdicts(config)]}


def show(path: str, page: str | None = None, figures: str | None = None) -> str:
    """Write a report's page again, and its figures if asked, and return the report as text.

    Args:
        path: folder of a model. Without a report in it, only the runtimes are shown.
        page: file to write the page to. Default: `report.html` in the folder.
        figures: folder for PNG files. Default: none are made.

    Returns:
        The text for the terminal.

    Raises:
        ValueError: there is no model; or a page or figures are asked for, and there is no report.
    """
    report, config = read(path)
    name = Path(path).resolve().name
    if report is None:
        if page or figures:
            raise HfDmsError(f"'{path}' has no {REPORT}: hf_dms did not prune it, so there is nothing to show.")
        return runtimes(config)
    target = Path(page) if page else Path(path, PAGE)
    try:
        content = render(report, config, name)
    except (jinja2.UndefinedError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise HfDmsError(
            f"{Path(path, REPORT)} lacks what the page shows, or has it in another form: {error}. If it was changed by "
            "hand, undo the change."
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
    written = [str(target), *(str(file) for file in (write_figures(report, figures) if figures else []))]
    lines = loading_lines(report["model_class"], path)
    return "\n\n".join(
        [
            report_table(report),
            size_bars(report),
            *notes(report),
            sizes_table(report["sizes"]),
            runtimes(config),
            lines,
            "Wrote " + ", ".join(written),
        ]
    )


def runtimes(config: dict[str, Any]) -> str:
    """The rows of the table of runtimes that apply to a checkpoint, for the terminal."""
    found = verdicts(config)
    if not found:
        return f"Runtimes: nothing is known of model type '{config.get('model_type')}', which hf_dms does not prune."
    words = "; ".join(f"{status}: {meaning}" for status, meaning in STATUSES.items())
    lines = [f"{v.runtime:13}{v.status:8}{v.words.replace('`', '')} ({v.version})" for v in found]
    return "\n".join([f"Who can load it, layout {layout_of(config)} ({words})", *(f"  {line}" for line in lines)])


def read(path: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The report, if there is one, and the config in a model's folder.

    Raises:
        ValueError: there is no model, or a file that is not what it should be.
    """
    report_file, config_file = Path(path, REPORT), Path(path, CONFIG_NAME)
    if not config_file.is_file():
        raise HfDmsError(f"'{path}' is not the folder of a model: it has no config.json. Give one that prune wrote.")
    config = read_json(config_file, "report", "config.schema.json")
    if not report_file.is_file():
        return None, config
    return read_json(report_file, "report", "dms_report.schema.json"), config
