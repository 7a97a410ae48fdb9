"""The tutorials run on real models, and print what the pages show. Slow: `make test-slow`."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("tutorial_llama", "tutorial_bert", "tutorial_vit")
NEEDED = {
    "tutorial_llama": ["smollm2-135m"],
    "tutorial_bert": ["minilm", "movie-sentiment"],
    "tutorial_vit": ["vit", "fashion-mnist"],
}
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)\n```)?", re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
LEARNED = re.compile(r"^layer \d+: ")  # sizes differ between machines; only the form is compared
PROGRESS = re.compile(r"^(search|training|recover): |^\{'")  # lines of a Trainer, which the pages leave out


def blocks(page):
    return BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_prints_what_it_says(page, tmp_path, monkeypatch):
    for name in NEEDED[page]:
        if not (ROOT / "models" / name).exists():
            pytest.fail(f"models/{name} is missing: run `make model data`.")
    for folder in ("models", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    says = any(expected for _, expected in blocks(page))
    for code, expected in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        lines = [line for line in printed.getvalue().splitlines() if line.strip() and not PROGRESS.match(line)]
        said = expected.splitlines() if says else lines
        assert len(lines) == len(said), lines
        for line, saying in zip(lines, said):
            if not numbers(saying):
                continue  # a model's texts differ between machines
            assert NUMBER.sub("#", line) == NUMBER.sub("#", saying)
            if LEARNED.match(line):
                continue
            for value, word in zip(numbers(line), numbers(saying)):
                assert value == pytest.approx(word, rel=0.25, abs=0.05), (line, saying)


def numbers(line):
    return [float(word.replace(",", "")) for word in NUMBER.findall(line)]


NOTEBOOK = ROOT / "examples" / "search.ipynb"


def test_the_notebook_was_executed_and_has_its_pictures():
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 4


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("minilm", "movie-sentiment"):
        if not (ROOT / "models" / name).exists():
            pytest.fail(f"models/{name} is missing: run `make model data`.")
    (tmp_path / "models").symlink_to(ROOT / "models")
    notebook = nbformat.read(NOTEBOOK, 4)
    options = {"timeout": 3000, "kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, **options).execute()  # raises for a cell that fails
