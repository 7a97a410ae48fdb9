"""The pictures of a report: their bars and lines, and what a page and a paper need."""

import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest
from helpers.reports import Tags, make_report
from matplotlib.figure import Figure
from PIL import Image

from hf_dms.report.figures import COLOURS, bars_panel, cut_panels, lines_panel, search_panels, svg, write_figures
from hf_dms.report.page import render

LINE = lines_panel("a", "t", ("x", "y"), {"one": [(0, 1.0), (1, math.nan), (2, 3.0), (3, 2.0)]})


def on_axes(panel):
    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def panels(**more):
    report = make_report() | more
    return [*cut_panels(report), *search_panels(report)]


# ---- what they say ---------------------------------------------------------------------------------------------------
def test_a_bar_is_as_high_as_what_is_kept_and_a_dropped_layer_has_none():
    axes = on_axes(bars_panel("mlp", [10, 5, 0], 10))
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"cut": [10, 10], "kept": [10, 5], "layer dropped": [10]}
    assert axes.get_ylim() == (0, 10)
    assert "<title>layer 1: 5 of 10 mlp</title>" in svg(bars_panel("mlp", [10, 5, 0], 10))
    assert "<title>layer 2: dropped</title>" in svg(bars_panel("mlp", [10, 5, 0], 10))


@pytest.mark.parametrize(("layers", "units"), [(1, 1), (2, 3), (32, 11008), (80, 64)])
def test_the_axes_of_bars_count_layers_and_units_and_name_all_units(layers, units):
    axes = on_axes(bars_panel("mlp", [units] * layers, units))
    assert axes.get_yticks()[-1] == units
    low, high = axes.get_xlim()
    for ticks in ([tick for tick in axes.get_xticks() if low <= tick <= high], axes.get_yticks()):
        assert 1 <= len(ticks) <= 10
        assert all(tick == int(tick) for tick in ticks)


def test_a_line_breaks_where_there_is_no_number():
    path = next(path for path in re.findall(' d="(.*?)"', svg(LINE)) if "L" in path and path.count("M") == 2)
    assert path.count("L") == 1
    assert LINE.summary == "t: one from 1 to 2."


def test_few_points_are_marked_so_that_a_single_one_is_seen():
    few = {"one": [(0.5, 47.0)], "two": [(0.5, 158.2), (0.8, 49.6)]}
    budgets = lines_panel("budgets", "Quality over budget", ("parameters kept", "perplexity"), few)
    assert svg(budgets).count("<use") == 3 + 2  # one per point, and one per line of the legend
    many = lines_panel("many", "t", ("x", "y"), {"one": [(step, 1.0) for step in range(50)]})
    assert "<use" not in svg(many)


def test_the_search_is_told_by_steps_as_shares_of_the_dense_model():
    report = make_report()
    report["search"][1]["task_loss"] = None
    loss, resource, kept = map(on_axes, search_panels(report))
    assert math.isnan(loss.lines[0].get_ydata()[1])
    assert [line.get_label() for line in resource.lines] == ["resource", "target"]
    assert next(zip(*kept.lines[0].get_data())) == (2, (20 - 2 / 8) / 20)
    assert len(kept.collections) == 1  # the range of mlp over the layers; the number of layers has no range
    assert kept.get_ylim()[0] == 0


def test_dims_of_a_kind_share_a_line_where_there_are_too_many(tmp_path):
    dims = [f"mid{block}" for block in range(16)] + [f"hidden{block}" for block in range(8)] + ["top"]
    logs = [{"step": step, "task_loss": 1.0, "resource": 1.0, "target": 1.0} for step in range(3)]
    for row in logs:
        row |= {f"kept/{dim}": 10 - row["step"] - place % 2 for place, dim in enumerate(dims)}
    report = {"search": logs, "units": dict.fromkeys(dims, 10), "sizes": {}}
    kept = search_panels(report)[-1]
    lines = {line.get_label(): [round(y, 6) for y in line.get_ydata()] for line in on_axes(kept).lines}
    assert lines == {"mid": [0.95, 0.85, 0.75], "hidden": [0.95, 0.85, 0.75], "top": [1.0, 0.9, 0.8]}
    write_figures(report, tmp_path)  # matplotlib would warn if no room were left for the axes


def test_a_report_without_a_search_or_without_a_single_number_has_no_such_pictures():
    report = make_report()
    for row in report["search"]:
        row["task_loss"] = None
    assert [panel.name for panel in search_panels(report)] == ["search-resource", "search-kept"]
    del report["search"]
    assert search_panels(report) == []


# ---- in a page -------------------------------------------------------------------------------------------------------
def test_a_picture_is_the_same_each_time_whatever_the_style_of_the_user():
    before = [svg(panel) for panel in panels()]
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9, "svg.fonttype": "path"}
    ):
        assert [svg(panel) for panel in panels()] == before


def test_words_are_text_without_markup_or_formulas():
    for words in ("<script>\"'{{ 1 }}", "<img src=x>", "$x^2$", "a & b_c"):
        lines = lines_panel("a", words, (words, words), {words: [(0, 1), (1, 2)], "other": [(0, 1)]})
        for panel in (lines, bars_panel(words, [1, 0], 2)):
            page = Tags(svg(panel))
            assert words in page.text
            allowed = {"svg", "title", "desc", "g", "path", "text", "defs", "clippath", "rect", "pattern", "use"}
            assert {tag for tag, _ in page.tags} <= allowed


def test_pictures_are_named_and_told_to_who_cannot_see_them():
    for panel in panels():
        root = ElementTree.fromstring(svg(panel))
        assert root.get("role") == "img"
        named = [root.find(f"*[@id='{name}']").text for name in root.get("aria-labelledby").split()]
        assert named == [panel.title, panel.summary]


def test_identifiers_in_a_page_are_unique_and_those_referred_to_are_there():
    tags = Tags(render(make_report(), {"model_type": "llama"}, "name")).tags
    found = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(set(found)) == len(found)
    values = [value or "" for _, attributes in tags for value in attributes.values()]
    referred = {name for value in values for name in re.findall(r"url\(#(.*?)\)", value)}
    referred |= {value[1:] for tag, attributes in tags for value in [attributes.get("href", "")] if tag == "use"}
    assert referred <= set(found)
    assert len(referred) > 3


def test_every_colour_is_a_variable_that_the_page_gives_a_light_and_a_dark_value():
    page = render(make_report(), {"model_type": "llama"}, "name")
    style, body = page.split("</style>")
    assert not re.search(r":\s*#[0-9a-f]{3}|white|black", "".join(re.findall('style="(.*?)"', body)))
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert set(COLOURS) >= used >= {"c0", "c1", "c5", "cut", "soft", "rule"}
    for colours in re.split("prefers-color-scheme: dark", style):
        assert set(re.findall(r"--(\w+): #", colours)) >= set(COLOURS)


def test_a_page_of_a_large_model_stays_small():
    steps = [make_report()["search"][0] | {"step": step} for step in range(500)]
    large = {"sizes": {"kv": [8] * 80, "mlp": [8192] * 80}, "units": {"kv": 8, "mlp": 8192}, "search": steps}
    page = render(make_report() | large | {"kept_layers": list(range(80))}, {"model_type": "llama"}, "name")
    assert len(page.encode()) < 200_000


# ---- in a paper ------------------------------------------------------------------------------------------------------
def test_figures_are_png_files_on_white(tmp_path):
    report = make_report()
    found = write_figures(report, tmp_path / "figures")
    assert [file.name for file in found] == ["cut.png", "search.png"]
    for file in found:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 400
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    del report["search"]
    assert [file.name for file in write_figures(report, tmp_path)] == ["cut.png"]
