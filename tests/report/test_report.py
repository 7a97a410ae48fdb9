"""`report.html` in a real browser, `hf-dms report`, and what dms_report.json reveals about a machine."""

import base64
import copy
import html
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.browser import needs_chromium, open_page
from helpers.reports import NASTY, Tags, make_report
from helpers.schema import SCHEMA, mistakes
from helpers.tiny import tiny_llama
from PIL import Image

from hf_dms.cli import main
from hf_dms.report.numbers import as_written, notes, report_table, size_bars, without_local_paths
from hf_dms.report.page import render
from hf_dms.report.report import schema
from hf_dms.tasks.images import picture

CONFIG = {"model_type": "dms_llama", "hidden_size": 24, "per_layer_config": {"0": {"num_key_value_heads": 2}}}


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
            assert attributes.get(key, "#").startswith(("data:", "#"))


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
    cut: all("figure text").filter(e => {{
      const [a, b] = [e, e.ownerSVGElement].map(e => e.getBoundingClientRect());
      return a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom;
    }}).map(e => e.textContent),
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
    assert found["cut"] == []
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


# ---- pictures of inputs ----------------------------------------------------------------------------------------------
def test_pictures_of_inputs_are_small_pngs():
    image = picture(torch.rand(3, 224, 112))
    data = base64.b64decode(image.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (32, 64)
    assert picture(torch.zeros(2, 4, 4)).startswith("data:image/png")  # an image without contrast, with two channels


# ---- hf-dms report ---------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dms_report.json").write_text(json.dumps(make_report()))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_report_prints_tables_and_runtimes_and_renews_the_page(folder, capsys):
    assert main(["report", str(folder), "--figures", str(folder / "figures")]) == 0
    printed = capsys.readouterr().out
    assert "| parameters | 1,000 | | 600 |" in printed.replace("|  |", "| |")
    assert re.search(r"llama.cpp +no ", printed)
    assert "AutoModelForCausalLM.from_pretrained" in printed
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "figures" / "cut.png").is_file()
    assert main(["report", str(folder), "--html", str(folder / "new" / "page.html")]) == 0
    assert (folder / "new" / "page.html").is_file()
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
        ("dms_report.json", json.dumps(make_report() | {"format": 9}), "at $.format, 1 was expected"),
    ],
)
def test_what_is_no_report_is_refused(folder, file, content, message, capsys):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    assert main(["report", str(folder)]) == 2
    assert message in capsys.readouterr().err


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
        "eval": {"prompt": "/etc is a folder", "texts": {"other": str(tmp_path / "other.jsonl")}},
    }
    before = copy.deepcopy(recipe)
    found = without_local_paths(recipe)
    assert found["model"]["path"] == ".../dense"
    assert found["data"] == {"path": ".../texts.jsonl", "held_out": 0.1, "split": "train", "name": "org/name"}
    assert found["train"] == {"deepspeed": ".../zero.json", "report_to": ["none"], "optim": "adamw_torch"}
    assert found["output"]["path"] == ".../out"
    assert found["eval"] == {"prompt": "/etc is a folder", "texts": {"other": ".../other.jsonl"}}
    assert without_local_paths({"mix": {"self": 1, str(tmp_path): 2}}) == {
        "mix": {"self": 1, f".../{tmp_path.name}": 2}
    }
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


def without_masks(report):
    return {key: value for key, value in report.items() if key != "masks"}


def test_a_report_without_soft_masks_is_one_of_a_choice_without_a_search():
    report = make_report()
    assert mistakes(without_masks(report) | {"search": []}) == []
    assert "is not valid under any of" in mistakes(without_masks(report))[0]


def test_the_quality_on_soft_masks_is_a_column_beside_that_of_the_cut():
    lines = report_table(make_report()).splitlines()
    assert lines[0].startswith("| | dense | soft masks | pruned |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    cells = [cell.strip() for cell in next(line for line in lines if "held-out perplexity" in line).split("|")]
    assert cells[3:5] == ["0.75", "0.75"]
    parameters = [cell.strip() for cell in next(line for line in lines if "parameters" in line).split("|")]
    assert parameters[3] == ""
    assert parameters[4] == f"{make_report()['pruned']['num_params']:,}"
    assert "soft masks" not in report_table(without_masks(make_report()))


@pytest.mark.parametrize(("more", "per"), [({}, "token"), ({"macs_per": "image"}, "image")])
def test_macs_are_those_of_a_token_or_of_a_whole_image(more, per):
    report = make_report() | more | {"original": {"num_params": 2000, "macs_per_token": 2000, "target": 0.5}}
    assert mistakes(report) == []
    assert f"| MACs per {per} | 900 |" in report_table(report)
    assert f"2,000 MACs per {per} (the result: 0.450 of them)" in notes(report)[0]


def test_what_is_said_beside_the_table_is_of_a_search_alone():
    report = make_report()
    assert notes(report) == []
    assert notes(report | {"outcome": {"message": "Below."}}) == ["Below."]
    assert notes({"dense": {}, "pruned": {}}) == []


def test_the_schema_is_that_of_the_dataclass():
    """To renew the file: python -m hf_dms.report.report > hf_dms/report/dms_report.schema.json"""
    assert schema() == SCHEMA


def test_every_key_is_in_the_document():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert [key for key in SCHEMA["properties"] if f"`{key}`" not in text] == []


# ---- the terminal ----------------------------------------------------------------------------------------------------
def test_bars_show_each_layers_width_and_the_layers_that_are_gone():
    sizes = {"kv": [3, 1, 0, 2], "mlp": [16, 2, 0, 1], "hidden": [18], "layers": [3]}
    report = {"sizes": sizes, "units": {"kv": 3, "mlp": 16, "hidden": 24, "layers": 4}}
    assert size_bars(report).splitlines() == [
        "      kv █▃ ▆  1 to 3 of 3",
        "     mlp █▁ ▁  1 to 16 of 16",
        "   whole hidden 18 of 24, layers 3 of 4",
    ]
