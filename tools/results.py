"""benchmarks/RESULTS.md, made of committed rows alone: `python tools/results.py` renews it.

Rows of `hf-dms compare` are in benchmarks/compare/NAME.jsonl, copied from `rows.jsonl`. NAME is the recipe's name in
recipes/compare. Rows of benchmarks/rival_torch_pruning.py are in benchmarks/rivals.jsonl, those of the other tools'
scripts in benchmarks/rivals_TOOL.jsonl, those of benchmarks/speed.py in speed.jsonl, and those of scripts that measure
time, memory or numerics in benchmarks/tables/SCRIPT.jsonl. A plot beside the first is drawn anew with `python
tools/results.py --plots`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hf_dms.measure.bench import bench_table
from hf_dms.report.comparison import comparison_panels, comparison_table
from hf_dms.report.figures import save

TITLES = {
    "sharpness": "First soft masks: `python benchmarks/sharpness.py models/smollm2-135m`",
    "topk": "The operator: `python benchmarks/topk.py`",
    "step_overhead": "Cost of a search step: `python benchmarks/step_overhead.py`",
    "refit_step": "Cost of a search over refitted weights: `python benchmarks/refit_step.py models/smollm2-135m`",
    "kept_logits": "Kept logits: `python benchmarks/kept_logits.py models/minilm models/movie-sentiment/train.jsonl`",
    "kept_memory": "Kept freed memory: `python benchmarks/kept_memory.py models/smollm2-135m`",
    "llama_7b": "What Llama-7B needs: `python benchmarks/llama_7b.py`",
    "streaming": "Memory of a cut from files: `python benchmarks/streaming.py`",
    "distributed": "Several processes: `python benchmarks/distributed.py`",
}  # of the tables in benchmarks/tables
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HEADER = """# Results

Made by `python tools/results.py` of the rows in `benchmarks/compare` and `benchmarks/rivals*.jsonl`; a test compares.
No number here is typed by hand.

Each strategy chose structure on the same model, examples and order, at the same budget, and saw as many tokens (or, in
`seen`, examples) as it says: choice, repair and training together. Arrows lead from the dense model to the cut and
what was done to it. In brackets: the paired difference from the first strategy at that target, over the same held-out
examples and seeds, with its standard error (nats per token for perplexity, points for accuracy). Rows that a recipe
names and the table lacks have not been run.
"""


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def section(file: Path) -> str:
    """The section for one file of rows."""
    rows = rows_of(file)
    machines = sorted({_machine(**row["machine"]) for row in rows})
    versions = sorted({", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in rows})
    commits = sorted({row["commit"] or "unknown" for row in rows})
    parts = [f"## {file.stem}: `hf-dms compare recipes/compare/{file.stem}.yaml`", comparison_table(rows)]
    if (BENCHMARKS / "compare" / f"{file.stem}.png").is_file():
        parts.append(f"![quality over budget](compare/{file.stem}.png)")
    hours = sum(sum(row["seconds"].values()) for row in rows) / 3600
    parts.append(
        f"{len(rows)} rows, {hours:.1f} hours in all; commits {', '.join(commits)}; {'; '.join(machines)}; "
        f"{'; '.join(versions)}."
    )
    return "\n\n".join(parts)


def _machine(cores: int, threads: int, accelerator: str | None = None, **_: Any) -> str:
    return f"{cores} cores, {threads} threads" + (f", {accelerator}" if accelerator else "")


def rivals(file: Path) -> str:
    """The results of another tool beside ours, a line for each row."""
    header = "| kept | criterion | tool | units kept | per layer | kept by both | perplexity | second text |"
    lines = [header, "|" + "---|" * header.count(" | ") + "---|"]
    rows = rows_of(file)
    for row in sorted(rows, key=lambda row: (-row["target"], row["criterion"])):
        tool = f"{row['tool']} {row['version']}"
        if row["tool"] != "hf_dms":
            tool += f", normalizer {row['normalizer'] or 'none'}"
        cells = [f"{row['target']:g}", row["criterion"], tool, f"{row['units']:,}"]
        cells += [f"{row['narrowest']:,} to {row['widest']:,}", f"{row['agreement']:.2%}"]
        lines.append(
            f"| {' | '.join([*cells, format(row['perplexity'], ',.1f'), format(row['second_text'], ',.1f')])} |"
        )
    title = "## torch-pruning beside ours: `python benchmarks/rival_torch_pruning.py models/smollm2-135m`"
    protocols = sorted({f"{row['batches']} batches, {row['windows']} windows of each text" for row in rows})
    about = (
        "MLP widths of SmolLM2-135M, both tools on the same gradients, dropping equally many channels of all layers "
        f"together;\nattention whole, no repair; {'; '.join(protocols)}."
    )
    return "\n\n".join([title, about, "\n".join(lines)])


def widths_by_optipfair(file: Path) -> str:
    """The results of optipfair beside our criteria, at the same width of all layers."""
    rows = sorted(rows_of(file), key=lambda row: (-row["target"], row["perplexity"]))
    lines = ["| kept | tool | criterion | MLP width | perplexity | second text |", "|---" * 6 + "|"]
    lines += [
        f"| {row['target']:g} | {row['tool']} {row['version']} | {row['criterion']} | {row['width']:,} | "
        f"{row['perplexity']:,.1f} | {row['second_text']:,.1f} |"
        for row in rows
    ]
    title = "## optipfair beside ours: `python benchmarks/rival_optipfair.py models/smollm2-135m`"
    about = (
        "The same MLP width in all layers of SmolLM2-135M, attention whole, no repair; "
        f"{rows[0]['batches']} batches for what\nlooks at data, {rows[0]['windows']} windows of each text."
    )
    return "\n\n".join([title, about, "\n".join(lines)])


def macs_by_modelopt(file: Path) -> str:
    """The results of FastNAS beside ours, means over seeds."""
    rows = rows_of(file)
    lines = ["| way | tool | seeds | MACs | accuracy after the cut | after three epochs |", "|---" * 6 + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        same = [row for row in rows if row["way"] == way]

        def mean(key: str, same: list[dict[str, Any]] = same) -> float:
            return sum(row[key] for row in same) / len(same)

        cut = "" if way == "dense" else f"{mean('cut'):.4f}"
        lines.append(
            f"| {way} | {same[0]['tool']} {same[0]['version']} | {len(same)} | {mean('macs') / 1e6:.2f}M | {cut} | "
            f"{mean('accuracy'):.4f} |"
        )
    title = "## FastNAS beside ours: `python benchmarks/rival_modelopt.py models/fashion-mnist`"
    about = (
        "A basic ResNet on Fashion-MNIST (6,000 training, 2,000 held-out images), cut to the MACs that FastNAS came to."
    )
    return "\n\n".join([title, about, "\n".join(lines)])


def measured(file: Path) -> str:
    """A table of benchmarks/tables as its rows have it, and what produced them."""
    rows = rows_of(file)
    columns = list(dict.fromkeys(column for row in rows for column in row["cells"]))
    lines = [f"| {' | '.join(columns)} | machine | load | commit |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        cells = [row["cells"].get(column, "") for column in columns]
        texts = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join([*texts, _machine(**row['machine']), str(row['load']), row['commit']])} |")
    return "\n\n".join([f"## {TITLES[file.stem]}", "\n".join(lines)])


def speeds(file: Path) -> str:
    """What `hf-dms bench` printed for each cut of benchmarks/speed.py."""
    rows = rows_of(file)
    tables = [
        f"### {row['cut'].partition(', ')[2]} ({row['cut'].partition(',')[0]})\n\n{bench_table(row)}" for row in rows
    ]
    return "\n\n".join(["## Speed of cuts: `python benchmarks/speed.py`", *tables])


def results(folder: Path = BENCHMARKS / "compare", others: Path = BENCHMARKS / "rivals.jsonl") -> str:
    """The content of RESULTS.md."""
    parts = [section(file) for file in sorted(folder.glob("*.jsonl"))]
    for file, table in (
        (others, rivals),
        (others.with_name("rivals_optipfair.jsonl"), widths_by_optipfair),
        (others.with_name("rivals_modelopt.jsonl"), macs_by_modelopt),
        (others.with_name("speed.jsonl"), speeds),
        *((others.with_name("tables") / f"{name}.jsonl", measured) for name in TITLES),
    ):
        parts += [table(file)] if file.is_file() else []
    return "\n".join([HEADER, *(part + "\n" for part in parts)])


def main() -> None:
    if "--plots" in sys.argv[1:]:
        for file in sorted((BENCHMARKS / "compare").glob("*.jsonl")):
            panels = comparison_panels(rows_of(file))
            save(file.with_suffix(".png"), panels, len(panels), (4.0, 3.4), font_size=8, dpi=120, facecolor="white")
    (BENCHMARKS / "RESULTS.md").write_text(results(), encoding="utf-8")


if __name__ == "__main__":
    main()
