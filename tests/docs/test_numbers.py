"""Numbers in README and docs that name a comparison equal those of its rows."""

import json
import re

import pytest
from helpers.launching import ROOT

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


def readme_section(title):
    return (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_quality_below_the_readme_s_table_is_in_a_row():
    """Accuracies have four decimals, perplexities one; a speed is in benchmarks/README.md."""
    text = "\n".join(line for line in readme_section("What you lose").splitlines() if not line.startswith("|"))
    numbers = set(re.findall(r"\b\d+\.\d+\b", text.replace("](docs/", "](")))
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert len(numbers) > 8
    missing = {number for number in numbers if number not in results and f"**{number}0**" not in measured}
    assert missing == set()


def test_the_readme_counts_the_strategies_with_rows_and_names_the_accelerator():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    strategies = set(re.findall(r"^\| [\d.]+ \| ([\w-]+) \|", results, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{len(strategies)} strategies](benchmarks/RESULTS.md)" in readme
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
    assert [row["row"] for row in rows] == ["dense", "dms", "dms-recovered"]
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    said = page.partition("| fashion-detection (")[2].partition("| smollm2-per-layer")[0].splitlines()
    header = (ROOT / "recipes" / "fashion-detection.yaml").read_text(encoding="utf-8").partition("model:")[0]
    for row, line in zip(rows, said):
        value, error = (f"{row[key]:.4f}".removeprefix("0") for key in ("mean_average_precision", "stderr"))
        assert f"| {value} ± {error} |" in line
        assert value in header
        if "difference" in row:
            assert f"| {row['difference']:+.4f} ± {row['difference_stderr']:.4f} |" in line
