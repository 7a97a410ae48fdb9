"""A real pretrained model, and the package as a user installs it. Slow: `make test-slow`."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_dms.cli import main

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m"
pytestmark = pytest.mark.slow

LOAD = """
import sys, torch
sys.modules["hf_dms"] = None  # it must load without
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trust = sys.argv[1], sys.argv[2] == "True"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
inputs = tokenizer("The Congress of the United States", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
"""


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_smollm2_from_the_quickstart_recipe_loads_without_hf_dms_and_writes_english(layout, tmp_path):
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: run `make model`.")
    options = ["train.max_steps=30", "eval.examples=4", f"dms.layout={layout}", f"output.path={tmp_path / 'out'}"]
    assert main(["prune", "quickstart.yaml", f"model.path={MODEL}", *options]) == 0
    report = json.loads((tmp_path / "out" / "dms_report.json").read_text())
    assert report["pruned"]["num_params"] < report["dense"]["num_params"]
    assert report["pruned"]["perplexity"] < 3 * report["dense"]["perplexity"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "out"), str(layout == "per_layer")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert len(set(words)) > 10, done.stdout


def test_the_wheel_works_outside_the_tree(tmp_path):
    def run(*command, **kwargs):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, **kwargs)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hf_dms/recipes/quickstart.yaml", "hf_dms/recipes/data/sotu_train.jsonl"} <= set(names)
    files = [path for path in (ROOT / "hf_dms").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= set(names)  # templates, schemas and tables too
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(site)}
    overrides = [f"model.path={MODEL}"]
    script = "import hf_dms, sys; assert 'site' in hf_dms.__file__, hf_dms.__file__\nfrom hf_dms.cli import main\n"
    script += "sys.exit(main(sys.argv[1:]))"
    out = run(sys.executable, "-c", script, "validate", "quickstart.yaml", *overrides, env=environment)
    assert "quickstart.yaml: ok" in out
