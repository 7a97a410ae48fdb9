"""Numbers in README and docs that name a comparison equal those of its rows."""

import json
import re

import pytest
from helpers.launching import ROOT

from hf_dms.config import SEARCH
from hf_dms.strategies.one_shot import CRITERIA

TABLES = ["README.md", "docs/targets.md"]
NUMBER = re.compile(r"\d+\.\d+")


def results_of(name):
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    return text.split(f"\n## {name}: ")[1].split("\n## ")[0]


def rows_of_comparisons(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found = [(line, re.search(r"recipes/compare/([\w-]+)\.yaml", line)) for line in lines if line.startswith("|")]
    return [(line, link[1]) for line, link in found if link]


@pytest.mark.parametrize("page", TABLES)
def test_numbers_of_a_comparison_are_those_of_its_rows(page):
    rows = rows_of_comparisons(page)
    assert rows
    for line, name in rows:
        percent = int(re.search(r"(\d+) %", line)[1])
        target = f"| {percent / 100:g} |"
        at_target = [row for row in results_of(name).splitlines() if row.startswith(target)]
        found = {number for row in at_target for number in NUMBER.findall(row)}
        assert set(NUMBER.findall(line)) <= found, (page, line)


def test_the_table_of_supernets_is_made_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import supernet

    made = supernet.table(supernet.read_rows(ROOT / "benchmarks" / "supernet.jsonl"))
    assert made in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def leaves(value):
    """Every number in a row, also those within its texts."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float):
        yield abs(float(value))


def is_among(number, values):
    """Whether a number as it is printed, such as 1,234.5 or .857, is one of the values, rounded up or down."""
    half = 0.5001 * 10.0 ** -len(number.partition(".")[2])
    printed = float(number.replace(",", ""))
    return any(abs(value - printed) <= half for value in values)


def values_of_rows(text):
    """Every number in the rows of the files that a text names."""
    files = {file for name in re.findall(r"(\w+\.jsonl)", text) for file in (ROOT / "benchmarks").glob(name)}
    return {
        value for file in files for line in file.read_text("utf-8").splitlines() for value in leaves(json.loads(line))
    }


def tables_of_the_benchmarks():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[1:]:
        table = [line for line in section.splitlines() if line.startswith("| ")]
        if table and "supernet.jsonl" not in section:  # the test above has that one
            yield pytest.param(section, table, id=section.partition(":")[0])


SETTINGS = {
    "benchmarks/README.md": {"38.5"},  # the aim of a search
    "docs/method.md": {"0.99", "0.002", "0.05", "0.3", "0.7"},
    "docs/targets.md": {"0.6", "0.4", "0.8", "0.5", "0.3"},
    "docs/supernet.md": {"1.5"},
    "docs/data.md": {"1.5"},
    "docs/strategies.md": set(),
}


@pytest.mark.parametrize("page", SETTINGS)
def test_every_measured_number_in_prose_is_in_a_row(page):
    """Numbers with decimals are what is measured, but for those that somebody set. Formulas and code are left out."""
    results = set(leaves((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").replace(",", "")))
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for section in text.split("\n## ") if page.startswith("benchmarks") else [text]:
        tables = page.startswith("benchmarks")  # tables of that page have the test above
        prose = "\n".join(line for line in section.splitlines() if not (tables and line.startswith("|")))
        prose = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|arXiv [\d.]+", "", prose)
        numbers = set(re.findall(r"(?<![\w.,])\d[\d,]*\.\d+(?![\w.])|(?<![\w.])\.\d+", prose)) - SETTINGS[page]
        values = results | values_of_rows(section)
        assert {number for number in numbers if not is_among(number, values)} == set()


@pytest.mark.parametrize(("section", "table"), list(tables_of_the_benchmarks()))
def test_every_measured_number_in_a_table_of_the_benchmarks_is_in_a_row(section, table):
    """A section names the files of its rows."""
    values = values_of_rows(section)
    numbers = {number for line in table[1:] for number in re.findall(r"(?<![\w.,])\d[\d,]*\.\d+|(?<![\w.])\.\d+", line)}
    assert len(numbers) > 5
    assert {number for number in numbers if not is_among(number, values)} == set()


def readme_section(title):
    return (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_quality_below_the_readme_s_table_is_in_a_row():
    text = "\n".join(line for line in readme_section("What you lose").splitlines() if not line.startswith("|"))
    numbers = set(re.findall(r"\b\d+\.\d+\b", text.replace("](docs/", "](")))
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(numbers) > 8
    assert {number for number in numbers if not is_among(number, set(leaves(results.replace(",", ""))))} == set()


def test_the_readme_counts_the_strategies_with_rows_and_names_the_accelerator():
    files = (ROOT / "benchmarks/compare").glob("*.jsonl")
    cells = [json.loads(row)["cell"] for file in files for row in file.read_text("utf-8").splitlines()]
    found = {cell["settings"].get("criterion", SEARCH) for cell in cells}
    assert found == {SEARCH, *CRITERIA}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{len(found)} strategies](docs/strategies.md)" in readme
    rows = (line for file in (ROOT / "benchmarks").rglob("*.jsonl") for line in file.read_text("utf-8").splitlines())
    accelerators = {
        machine["accelerator"] for row in rows if "accelerator" in (machine := json.loads(row).get("machine", {}))
    }
    assert accelerators
    assert all(name in readme for name in accelerators)


def test_the_table_of_the_start_page_is_a_row_of_the_quickstart():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (ROOT / "benchmarks/quickstart.jsonl").read_text("utf-8").splitlines()]
    table = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    found = [row for row in rows if f"{row['dense']['num_params']:,}" in table["parameters"] and says(row, table)]
    assert found, "no row of benchmarks/quickstart.jsonl has these numbers"
    assert f"{found[-1]['seconds']} s of them in the report" in page


def says(row, table):
    perplexities = [row["dense"]["perplexity"], row["soft"], row["pruned"]["perplexity"]]
    perplexities += [row.get("repaired", {}).get("perplexity", 0)]
    sizes = [row["dense"]["num_params"], row["pruned"]["num_params"]]
    return all(f"| {value:.2f} |" in table["held-out perplexity"] for value in perplexities) and all(
        f"| {value:,} |" in table["parameters"] for value in sizes
    )


@pytest.mark.parametrize("page", ["docs/tutorial_bert.md", "docs/tutorial_vit.md", "docs/targets.md"])
def test_accuracies_of_a_recipe_are_those_of_its_rows(page):
    """Three decimals without a zero in front, behind or before a link to the recipe in the same line or sentence."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = text.splitlines() if page.endswith("targets.md") else text.split("\n\n")
    rows = [json.loads(line) for line in (ROOT / "benchmarks/recipe.jsonl").read_text("utf-8").splitlines()]
    found = 0
    for block in blocks:
        link = re.search(r"recipes/([\w-]+\.yaml)", block)
        for number in re.findall(r"(?<=\s)\.\d{3}\b", block):
            known = {f"{row['accuracy']:.3f}".lstrip("0") for row in rows if link and row["recipe"] == link[1]}
            assert number in known, (page, block)
            found += 1
    assert found >= 2


def test_numbers_of_the_detector_are_those_of_its_rows():
    lines = (ROOT / "benchmarks" / "recipe.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["recipe"] == "fashion-detection.yaml"]
    assert len(rows) == 3 * 3  # three seeds
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    said = page.partition("| fashion-detection (")[2].partition("| smollm2-per-layer")[0].splitlines()
    header = (ROOT / "recipes" / "fashion-detection.yaml").read_text(encoding="utf-8").partition("model:")[0]
    for row in rows:
        line = said[["dense", "dms", "dms-recovered"].index(row["row"])]
        value, error = (f"{row[key]:.4f}".removeprefix("0") for key in ("mean_average_precision", "stderr"))
        assert f"{value} ± {error}" in line
        assert value in header
        if "difference" in row:
            assert f"{row['difference']:+.4f} ± {row['difference_stderr']:.4f}" in line
