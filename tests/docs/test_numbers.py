"""Numbers of the tables in README and docs that name a comparison are those of its rows."""

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
