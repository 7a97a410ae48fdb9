"""A comparison's numbers, table and plot, worked by hand; and benchmarks/RESULTS.md is made of the committed rows."""

import json
import math
from pathlib import Path

import pytest
import results
from matplotlib.figure import Figure

from hf_dms.report.comparison import comparison_numbers, comparison_panels, write_comparison

ROOT = Path(__file__).parents[2]


def row(strategy, losses, target=0.5, stages=("cut", "repaired")):
    def scored(values):
        mean = sum(values) / len(values)
        return {"text": {"perplexity": math.exp(mean), "scores": values}}

    scores = {"dense": scored([0.0, 0.0])} | dict(zip(stages, map(scored, losses)))
    about = {"commit": "abc", "versions": {"hf_dms": "0"}, "machine": {"cores": 2, "threads": 1}}
    about |= {"seconds": {"cut": 1800.0}}
    return {"cell": {"strategy": strategy, "target": target, "seed": 0}, "scores": scores, "seen": {"cut": 100}} | about


ROWS = [
    row("dms", [[1.0, 2.0], [1.0, 1.0]], 0.5),
    row("taylor", [[3.0, 3.0], [1.0, 2.0]], 0.5),
    row("dms", [[0.5, 0.5], [0.5, 0.5]], 0.8),
]


def test_numbers_are_means_and_paired_differences_after_the_last_stage():
    by = {(entry["target"], entry["strategy"]): entry for entry in comparison_numbers(ROWS)}
    assert list(by) == [(0.8, "dms"), (0.5, "dms"), (0.5, "taylor")]
    found = by[0.5, "taylor"]["texts"]["text"]
    assert found["repaired"] == pytest.approx(math.exp(1.5))
    assert found["difference"] == pytest.approx(0.5)
    assert found["difference_stderr"] == pytest.approx(0.5)  # of the scores 0 and 1
    assert "difference" not in by[0.5, "dms"]["texts"]["text"]


def test_the_best_strategy_stands_first_behind_the_one_that_all_are_compared_with():
    losses = {"dms": 2.0, "worst": 3.0, "broken": math.nan, "best": 1.0}
    rows = [row(name, [[0.0, 0.0], [loss, loss]]) for name, loss in losses.items()]
    assert [entry["strategy"] for entry in comparison_numbers(rows)] == ["dms", "best", "worst", "broken"]


def test_the_plot_has_a_line_per_strategy_over_the_budget():
    (panel,) = comparison_panels(ROWS)
    axes = Figure().subplots()
    panel.draw(axes)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["dms"] == [[0.5, pytest.approx(math.e)], [0.8, pytest.approx(math.exp(0.5))]]
    assert lines["taylor"] == [[0.5, pytest.approx(math.exp(1.5))]]
    assert axes.get_yscale() == "log"


def test_numbers_table_and_plot_are_written_side_by_side(tmp_path):
    table = write_comparison([*ROWS, row("one", [[1.0], [math.nan]], 0.3)], tmp_path)
    assert (tmp_path / "table.md").read_text() == table + "\n"
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers[-1]["texts"]["text"]["repaired"] is None
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_those_of_the_committed_rows():
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8") == results.results()


def test_rows_of_another_tool_are_shown_beside_ours(tmp_path):
    row = {"criterion": "taylor", "target": 0.8, "tool": "torch-pruning", "version": "1.6.1", "normalizer": None}
    row |= {"batches": 24, "windows": 32}
    row |= {"units": 1234, "narrowest": 5, "widest": 60, "agreement": 0.975, "perplexity": 51.26, "second_text": 24.04}
    file = tmp_path / "rivals.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"tool": "hf_dms", "version": "0.1.0"}) + "\n")
    found = results.results(tmp_path / "none", file)
    assert "| 0.8 | taylor | torch-pruning 1.6.1, normalizer none | 1,234 | 5 to 60 | 97.50% | 51.3 | 24.0 |" in found
    assert "| 0.8 | taylor | hf_dms 0.1.0 | 1,234 |" in found
    assert "24 batches, 32 windows of each text." in found


def test_every_number_of_the_results_changes_with_its_row(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    before = results.results(tmp_path, tmp_path / "none")
    assert "| 0.5 | taylor | 1 | 100 | 1.0 → 20.1 → 4.5 (+0.5 ± 0.5) |" in before
    assert "3 rows, 1.5 hours in all; commits abc; 2 cores, 1 threads; hf_dms 0." in before
    file.write_text("".join(json.dumps(each) + "\n" for each in [*ROWS[:1], row("taylor", [[3.0, 3.0], [2.0, 2.0]])]))
    assert "1.0 → 20.1 → 7.4 (+1 ± 0)" in results.results(tmp_path)
