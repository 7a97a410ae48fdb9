"""The scripts of examples/ run on tiny models, and each writes a smaller model that loads."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY
from transformers import AutoModel, BertConfig, BertForSequenceClassification

import hf_dms
from hf_dms.experiment.recipe import load_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=TINY["vocab_size"], **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "bert", "own_loop", "lora"])
def test_an_example_runs_and_leaves_a_smaller_model(name, dense, tiny_bert, tmp_path, monkeypatch, capsys):
    rows = [{"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 20))} for i in range(1, 12)]
    if name == "bert":
        rows = [row | {"label": ("negative", "positive")[i % 2]} for i, row in enumerate(rows)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    model = tiny_bert if name == "bert" else dense
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(model), "text.jsonl", "10"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    words = capsys.readouterr().out.splitlines()[-1].split()
    before, after = int(words[0].replace(",", "")), int(words[2].replace(",", ""))
    assert after < before
    assert AutoModel.from_pretrained(tmp_path / "outputs/example/pruned").num_parameters() <= after


def test_every_example_is_short_and_says_how_to_run_it():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"examples/{path.name}" in ast.get_docstring(ast.parse(text)), path
        assert len(text.splitlines()) < 45, path


def test_the_script_for_jobs_has_an_inline_header_and_refuses_to_lose_its_result(monkeypatch):
    text = (EXAMPLES / "hf_jobs.py").read_text(encoding="utf-8")
    header = "\n".join(line.removeprefix("#").strip() for line in text.split("# ///")[1].splitlines()[1:])
    try:
        import tomllib
    except ImportError:  # Python 3.10
        pytest.skip("needs tomllib")
    assert tomllib.loads(header)["dependencies"] == ["hf_dms[peft,quantization]"]
    name, *overrides = ast.get_docstring(ast.parse(text)).split("hf_jobs.py ")[1].split("\n\n")[0].split()
    recipe = load_recipe(name, [word for word in overrides if word != "\\"])
    assert recipe.model.path.split("/")[0] != "models"  # a job has no such folder
    assert recipe.hub.repo_id == "you/smaller"
    monkeypatch.setattr(sys, "argv", ["hf_jobs.py", "quickstart.yaml"])
    with pytest.raises(SystemExit, match=r"hub\.repo_id"):
        runpy.run_path(str(EXAMPLES / "hf_jobs.py"), run_name="__main__")


# ---- what a visitor looks for ----
def test_the_files_of_github_are_yaml_and_run_what_a_developer_runs():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == ["make test"]


def test_the_citation_has_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_dms.__version__
    assert "2405.07194" in str(citation["references"])
