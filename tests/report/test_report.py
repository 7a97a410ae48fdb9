"""`report.html` in a real browser, figures, `hf-dms report`, and what dms_report.json tells of a machine."""

import base64
import copy
import html
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.browser import needs_chromium, open_page
from helpers.schema import SCHEMA, mistakes
from helpers.tiny import tiny_llama
from PIL import Image

from hf_dms.cli import main
from hf_dms.report.charts import bar_chart, course, line_chart, ticks
from hf_dms.report.numbers import as_written, without_local_paths
from hf_dms.report.page import render
from hf_dms.tasks.images import picture

NASTY = (
    "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\"> ünïcödé 数 {{ 7 * 7 }}"
)
STEPS = range(2, 42, 2)


def numbers(**more):
    return {"num_params": 1000, "macs_per_token": 900, "kv_bytes_per_token": 64} | more


def make_report(task="text-generation", layers=6, text="a prompt"):
    """A report as `hf-dms prune` would write it, with a text wherever it holds words of a user."""
    metric = "perplexity" if task == "text-generation" else "accuracy"
    quality = {metric: 0.75, "stderr": 0.01, "difference": -0.1, "difference_stderr": 0.02}
    speed = {"tokens_per_second" if metric == "perplexity" else "texts_per_second": 50.0}
    search = [
        {"step": step, "task_loss": 3 + 1 / step, "resource": 1 - step / 100, "target": 1 - step / 110, "loss": 3.0}
        | {"kept/mlp": 20 - step / 8, "kept_min/mlp": 20 - step / 4, "kept_max/mlp": 20.0, "kept/layers": 6.0}
        for step in STEPS
    ]
    samples = [{"input": text, "outputs": {"dense": text + text, "recovered": text}}]
    if metric == "accuracy":
        probabilities = {"dense": 0.9, "recovered": 0.4}
        samples = [{"input": text, "label": text, "outputs": {"dense": text, "recovered": "no"}}]
        samples[0]["probabilities"] = probabilities
    return as_written(
        {
            "recipe": {
                "model": {"path": f"org/{text}", "task": task},
                "dms": {"target": 0.6, "resource": "params", "resource_scope": "model", "pipeline": "p"},
                "eval": {"prompt": text},
            },
            "seed": 0,
            "versions": {"hf_dms": "0.1.0"},
            "protocol": f"8 held-out {text}",
            "dense": numbers(**{metric: 0.8, "stderr": 0.01}, **speed),
            "pruned": numbers(num_params=600, **quality, **speed),
            "recovered": quality,
            "sizes": {"mlp": [20, 7, 0, 13, 1, 20][:layers], "hidden": [18], "layers": [layers - 1]},
            "units": {"mlp": 20, "hidden": 24, "layers": layers},
            "kept_layers": [layer for layer in range(layers) if layer != 2],
            "layout": "per_layer",
            "search": search,
            "masks": {"soft": quality},
            "samples": samples,
            "model_class": "DmsLlamaForCausalLM" if metric == "perplexity" else "DmsBertForSequenceClassification",
            "seconds": 61,
        }
    )


CONFIG = {"model_type": "dms_llama", "hidden_size": 24, "per_layer_config": {"0": {"num_key_value_heads": 2}}}


class Tags(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# ---- escaping --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_a_page_shows_what_the_data_says_and_does_nothing_of_it(task):
    page = Tags(render(make_report(task, text=NASTY), CONFIG | {"model_type": NASTY}, NASTY))
    harmless = Tags(render(make_report(task), CONFIG | {"model_type": "gpt2"}, "name"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert NASTY in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_a_page_fetches_nothing_and_forbids_scripts():
    report = make_report("text-classification")
    report["samples"][0]["input"] = picture(torch.rand(3, 8, 8))
    page = Tags(render(report, CONFIG, "name"))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(key, "data:").startswith("data:")


def test_a_picture_in_words_is_no_picture():
    report = make_report("text-classification")
    report["samples"][0]["input"] = "data:text/html,<script>1</script>"
    assert "img" not in {tag for tag, _ in Tags(render(report, CONFIG, "name")).tags}


# ---- in a browser ----------------------------------------------------------------------------------------------------
# A page in a frame as wide as a phone (headless windows are at least 500 wide), measured from outside: its own policy
# forbids scripts.
FRAME = """<!doctype html><iframe id="phone" width="390" height="844" style="border: 0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const page = document.getElementById("phone").contentDocument, all = s => [...page.querySelectorAll(s)];
  const size = e => parseFloat(getComputedStyle(e).fontSize) *
    (e.ownerSVGElement ? e.ownerSVGElement.getBoundingClientRect().width / 360 : 1);
  document.body.dataset.measured = JSON.stringify({{
    scroll: page.documentElement.scrollWidth,
    wide: all("body *").filter(e => !e.parentElement.closest(".scroll, pre, svg, details:not([open])"))
      .filter(e => e.getBoundingClientRect().right > 391).map(e => e.tagName + "." + e.className),
    words: all("p, td, th, li, text").length, smallest: Math.min(...all("p, td, th, li, text").map(size)),
  }});
}};
</script>"""


def measured(dom):
    return json.loads(html.unescape(re.search(r'data-measured="(.*?)"', dom)[1]))


@needs_chromium
def test_a_browser_runs_nothing_of_the_data(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render(make_report("text-classification", text=NASTY), CONFIG, NASTY), encoding="utf-8")
    dom, _ = open_page(page, tmp_path)
    found = Tags(dom)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert re.search("<title>(.*?)</title>", dom, re.DOTALL)[1].startswith("&lt;script&gt;")
    assert NASTY in found.text


@needs_chromium
def test_a_page_fits_a_phone_with_legible_words(tmp_path):
    report = make_report(text="averyverylongwordthatnobodycanbreak" * 8)
    report["sizes"]["mlp"], report["units"]["layers"] = [20, 7] * 40, 80
    text = render(report, CONFIG, "a-name-without-a-space" * 5)
    page = tmp_path / "frame.html"
    page.write_text(FRAME.format(page=html.escape(text)), encoding="utf-8")
    found = measured(open_page(page, tmp_path)[0])
    assert found["scroll"] == 390
    assert found["wide"] == []
    assert found["words"] > 50
    assert found["smallest"] >= 10  # pixels


@needs_chromium
def test_a_page_is_dark_where_the_reader_wants_it_dark(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render(make_report(), CONFIG, "name"), encoding="utf-8")
    for dark in (False, True):
        with Image.open(open_page(page, tmp_path, dark=dark)[1]) as shot:
            grey = sorted(shot.convert("L").tobytes())
        ground, text = grey[len(grey) // 2], grey[-1 if dark else 0]
        assert ground < 40 if dark else ground > 215
        assert abs(int(text) - ground) > 150


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_a_bar_is_as_high_as_the_share_that_is_kept_and_a_dropped_layer_has_none():
    chart = bar_chart("mlp", [10, 5, 0], 10)
    kept = [bar for bar in chart.bars if bar[5] == "kept"]
    dense = [bar for bar in chart.bars if bar[5] == "dense"]
    assert [round(a[3] / b[3], 2) for a, b in zip(kept, dense)] == [1, 0.5]
    assert [bar[5] for bar in chart.bars][-1] == "gone"
    assert "layer 2: dropped" in chart.bars[-1][4]


@pytest.mark.parametrize("low_high", [(0, 1), (0.83, 1.0), (2.19, 4.33), (0, 0), (1e-7, 3e-7), (0, 49152), (5, 5)])
def test_ticks_are_few_and_cover_the_range(low_high):
    low, high = low_high
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1}


def test_a_line_breaks_where_there_is_no_number():
    chart = line_chart("t", "x", "y", {"a": [(0, 1.0), (1, math.nan), (2, 3.0), (3, 2.0)]})
    assert [len(run.split()) for run in chart.series[0][1]] == [1, 2]
    assert "from 1 to 2" in chart.summary


def test_a_step_without_a_loss_is_a_gap_and_a_report_without_a_search_has_no_lines():
    report = make_report()
    report["search"][1]["task_loss"] = None
    assert math.isnan(course(report)["loss"]["task loss"][1][1])
    assert course(report)["kept"]["mlp"][0] == (2, (20 - 2 / 8) / 20)
    render(report, CONFIG, "name")
    del report["search"]
    assert course(report) == {}


def test_figures_are_png_files(tmp_path):
    from hf_dms.report.figures import write_figures

    report = make_report()
    found = write_figures(report, tmp_path / "figures")
    assert [file.name for file in found] == ["cut.png", "search.png"]
    for file in found:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 400
    del report["search"]
    assert [file.name for file in write_figures(report, tmp_path)] == ["cut.png"]


def test_pictures_of_inputs_are_small_pngs():
    image = picture(torch.rand(3, 224, 112))
    data = base64.b64decode(image.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (32, 64)
    assert picture(torch.zeros(2, 4, 4)).startswith("data:image/png")  # no contrast, and channels that are no colours


# ---- hf-dms report ---------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dms_report.json").write_text(json.dumps(make_report()))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_report_prints_tables_and_runtimes_and_renews_the_page(folder, capsys):
    assert main(["report", str(folder), "--figures", str(folder / "figures")]) == 0
    printed = capsys.readouterr().out
    assert "| parameters | 1,000 | 600 |" in printed
    assert re.search(r"llama.cpp +no ", printed)
    assert "AutoModelForCausalLM.from_pretrained" in printed
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "figures" / "cut.png").is_file()
    assert main(["report", str(folder), "--html", str(folder / "other.html")]) == 0
    assert (folder / "other.html").read_text() == (folder / "report.html").read_text()


def test_of_a_stock_model_the_runtimes_alone_are_told(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert re.search(r"llama.cpp +run ", capsys.readouterr().out)
    assert not (tmp_path / "report.html").exists()
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "x.html")]) == 2
    assert "hf_dms did not prune it, so there is nothing to show" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "is not the folder of a model: it has no config.json"),
        ("config.json", "{", "is not valid JSON"),
        ("dms_report.json", '{"format": 9}', "has format 9, this hf_dms shows 1"),
    ],
)
def test_what_is_no_report_is_refused(folder, file, content, message, capsys):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    assert main(["report", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_its_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(folder), "--figures", str(folder)]) == 2
    assert "pip install 'hf_dms[figures]'" in capsys.readouterr().err


# ---- the file --------------------------------------------------------------------------------------------------------
def test_local_paths_are_told_by_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "dense").mkdir(parents=True)
    (tmp_path / "train").mkdir()
    recipe = {
        "model": {"path": "models/dense", "revision": None, "task": "text-generation"},
        "data": {"path": str(tmp_path / "texts.jsonl"), "held_out": 0.1, "split": "train", "name": "org/name"},
        "train": {"deepspeed": "/etc/zero.json", "report_to": ["none"], "optim": "adamw_torch"},
        "output": {"path": "~/out"},
        "eval": {"prompt": "/etc is a folder"},
    }
    before = copy.deepcopy(recipe)
    found = without_local_paths(recipe)
    assert found["model"]["path"] == ".../dense"
    assert found["data"] == {"path": ".../texts.jsonl", "held_out": 0.1, "split": "train", "name": "org/name"}
    assert found["train"] == {"deepspeed": ".../zero.json", "report_to": ["none"], "optim": "adamw_torch"}
    assert (found["output"]["path"], found["eval"]) == (".../out", before["eval"])
    assert recipe == before
    assert without_local_paths({"path": "org/dense"}) == {"path": "org/dense"}


def test_what_is_not_finite_is_null():
    assert as_written({"a": [math.nan, 1.0], "b": {"c": -math.inf}}) == {
        "format": 1,
        "a": [None, 1.0],
        "b": {"c": None},
    }


def test_a_report_conforms_and_mistakes_are_found():
    report = make_report()
    assert mistakes(report) == []
    assert mistakes(report | {"seconds": 1.5}) == ["$.seconds: 1.5 is not of type 'integer'"]
    assert "'sample' was unexpected" in mistakes(report | {"sample": ""})[0]
    assert "$.layout: 'x' is not one of" in mistakes(report | {"layout": "x"})[0]
    assert "is valid under each of" in mistakes(report | {"model": {}, "proof": "tensors", "left_out": []})[0]


def test_every_key_is_in_the_document():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert [key for key in SCHEMA["properties"] if f"`{key}`" not in text] == []
