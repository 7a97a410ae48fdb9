"""A detector, from recipe to folder: searched, cut, repaired, trained, measured and shown."""

import itertools
import json

import pytest
import yaml
from datasets import Value
from helpers.marks import ordinary_if, slow
from helpers.scenes import LARGE_SIDE, NAMES, SIDE, conditional_detr, detr, pictures, rt_detr, save, write_scenes
from helpers.schema import mistakes
from transformers import AutoImageProcessor, AutoModelForObjectDetection, RTDetrForObjectDetection

from hf_dms.cli import main

ALONE = {  # detectors that give each class a probability of its own
    "conditional_detr": lambda: conditional_detr(image_size=SIDE),
    "rt_detr": lambda: rt_detr(image_size=LARGE_SIDE),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    boxes = [[[i % 5, i % 7, 6, 5]] * (i % 3) for i in range(12)]
    categories = [[i % 3] * (i % 3) for i in range(12)]
    return write_scenes(tmp_path_factory.mktemp("data") / "a.parquet", boxes, categories)


@pytest.fixture
def prune(tmp_path, data):
    """A function that writes a recipe for a tiny detector, and runs it; returns (exit code, output folder)."""

    def run(*overrides, command="prune", model=None, **sections):
        save(tmp_path / "model", model)
        values = {
            "model": {"path": str(tmp_path / "model"), "task": "object-detection", "dtype": "float32"},
            "data": {"path": data, "held_out": data},
            "dms": {"target": 0.7, "warmup_steps": 2, "resource_scope": "layers"},
            "train": {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
            "eval": {"samples": 2},
            "output": {"path": str(tmp_path / "out")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | sections))
        return main([command, str(tmp_path / "recipe.yaml"), *overrides]), tmp_path / "out"

    return run


def checked_report(out):
    """The report of a run with all stages, after a check that each was measured."""
    report = json.loads((out / "dms_report.json").read_text())
    assert mistakes(report) == []
    for name in ("dense", "pruned", "repaired", "recovered"):
        assert 0 <= report[name]["mean_average_precision"] <= 1
    assert report["pruned"]["num_params"] < report["dense"]["num_params"]
    return report


def test_a_detector_is_pruned_recovered_measured_and_shown(prune, data, capsys):
    recover = {"repair": {"examples": 4}, "distillation": {"weight": 0.5}, "max_steps": 2}
    code, out = prune(finetune={"max_steps": 2}, recover=recover)
    assert code == 0, capsys.readouterr().err
    report = checked_report(out)
    assert report["dense"]["images_per_second"] > 0
    sample = report["samples"][1]
    assert sorted(sample["pictures"]) == sorted(sample["outputs"]) == ["dense", "recovered"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "held-out mAP" in page
    card = (out / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card
    assert "mAP: 12 held-out images of `a.parquet`" in card
    pruned = AutoModelForObjectDetection.from_pretrained(out, trust_remote_code=True)
    assert pruned.config.id2label == dict(enumerate(NAMES))
    inputs = AutoImageProcessor.from_pretrained(out)(pictures(1), return_tensors="pt")
    assert pruned(pixel_values=inputs["pixel_values"]).pred_boxes.shape == (1, 4, 4)
    capsys.readouterr()
    assert main(["eval", str(out), "--data", data]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["mean_average_precision"] == pytest.approx(report["recovered"]["mean_average_precision"])
    assert row["examples"] == "12 images"


@pytest.mark.parametrize(
    "dms",
    [
        {"pipeline": "p-", "kl_weight": 1.0},
        {"pipeline": "p-", "search_over": "refitted", "prune": ["mlp"]},
        {"pipeline": "np"},
        {"strategy": "taylor"},
        {"strategy": "block_influence", "prune": ["layers"]},
    ],
    ids=lambda dms: "-".join(map(str, dms.values())),
)
def test_other_ways_to_choose_take_boxes_too(dms, prune, capsys):
    warmup = {} if "strategy" in dms else {"warmup_steps": 2}
    code, out = prune(dms={"target": 0.8, "resource_scope": "layers"} | warmup | dms, eval={"samples": 0})
    assert code == 0, capsys.readouterr().err
    report = json.loads((out / "dms_report.json").read_text())
    assert report["pruned"]["num_params"] < report["dense"]["num_params"]


@pytest.mark.parametrize("layout", slow("per_layer", "uniform", "padded"))
def test_an_encoder_and_decoder_behind_a_backbone_are_pruned_and_recovered(layout, prune, capsys):
    dms = {"target": 0.8, "warmup_steps": 2, "resource": "macs", "resource_scope": "layers", "layout": layout}
    recover = {"repair": {"examples": 4}, "distillation": {"weight": 0.5}, "max_steps": 2}
    code, out = prune(model=detr(image_size=SIDE), dms=dms, recover=recover)
    assert code == 0, capsys.readouterr().err
    report = json.loads((out / "dms_report.json").read_text())
    assert mistakes(report) == []
    assert report["pruned"]["num_params"] < report["dense"]["num_params"]
    pruned = AutoModelForObjectDetection.from_pretrained(out, trust_remote_code=True)
    assert pruned.num_parameters() == report["pruned"]["num_params"]
    assert pruned.config.model_type == ("dms_detr" if layout == "per_layer" else "detr")
    inputs = AutoImageProcessor.from_pretrained(out)(pictures(1), return_tensors="pt")
    assert pruned(pixel_values=inputs["pixel_values"]).pred_boxes.shape == (1, 4, 4)


def test_a_bad_box_ends_validate_in_one_line(prune, tmp_path, capsys):
    path = write_scenes(tmp_path / "b.parquet", [[[1, 1, 40, 4]]], [[0]])
    assert prune(f"data.path={path}", f"data.held_out={path}", command="validate")[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "row 1 of" in line
    assert "Correct it, or leave it out." in line


def test_a_comparison_of_detectors_is_refused(prune, capsys):
    assert prune(command="compare", compare={"strategies": {"taylor": {}}})[0] == 2
    assert "compare pairs the scores of single examples" in capsys.readouterr().err


# ---- classes with a probability each ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "layout"),
    ordinary_if(
        lambda kind, layout: (kind, layout) == ("rt_detr", "per_layer"),
        itertools.product(ALONE, ["uniform", "per_layer"]),
    ),
)
def test_a_detector_that_scores_each_class_alone_goes_from_recipe_to_folder(kind, layout, prune, data, capsys):
    dms = {"target": 0.85, "warmup_steps": 2, "resource_scope": "layers", "layout": layout}
    recover = {"repair": {"examples": 4}, "distillation": {"weight": 0.5}, "max_steps": 2}
    model = ALONE[kind]()
    assert prune(command="validate", model=model, dms=dms, recover=recover)[0] == 0, capsys.readouterr().err
    code, out = prune(model=model, dms=dms, finetune={"max_steps": 2}, recover=recover)
    assert code == 0, capsys.readouterr().err
    report = checked_report(out)
    assert sorted(report["samples"][1]["pictures"]) == ["dense", "recovered"]
    assert "mAP: 12 held-out images of `a.parquet`" in (out / "README.md").read_text()
    pruned = AutoModelForObjectDetection.from_pretrained(out, trust_remote_code=True)
    assert pruned.config.id2label == dict(enumerate(NAMES))
    inputs = AutoImageProcessor.from_pretrained(out)(pictures(1), return_tensors="pt")
    assert pruned(pixel_values=inputs["pixel_values"]).logits.shape == (1, 4, len(NAMES))
    capsys.readouterr()
    assert main(["eval", str(out), "--data", data]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["mean_average_precision"] == pytest.approx(report["recovered"]["mean_average_precision"])


WAYS = {
    "frozen": {"dms": {"pipeline": "p-", "kl_weight": 0.5}, "recover": {}},
    "fresh": {"dms": {"pipeline": "np"}, "recover": {"weights": "fresh", "max_steps": 2}},
    "padded": {"dms": {"layout": "padded"}, "recover": {"max_steps": 2}},
    "taylor": {"dms": {"strategy": "taylor"}, "recover": {"distillation": {"weight": 1.0}, "max_steps": 2}},
}


@pytest.mark.parametrize(
    ("kind", "way"),
    ordinary_if(
        lambda kind, way: (kind, way) in [("rt_detr", "frozen"), ("conditional_detr", "fresh")],
        itertools.product(ALONE, WAYS),
    ),
)
def test_other_ways_take_classes_with_a_probability_each(kind, way, prune, capsys):
    sections = WAYS[way]
    warmup = {} if "strategy" in sections["dms"] else {"warmup_steps": 2}
    dms = {"target": 0.85, "resource_scope": "layers"} | warmup | sections["dms"]
    code, out = prune(model=ALONE[kind](), eval={"samples": 0}, **sections | {"dms": dms})
    assert code == 0, capsys.readouterr().err
    report = json.loads((out / "dms_report.json").read_text())
    assert report["pruned"]["num_params"] < report["dense"]["num_params"]


def test_a_base_model_that_scores_classes_keeps_their_number(prune, tmp_path, capsys):
    boxes, names = [[[1, 1, 6, 5]]] * 4, [["fox"], ["ox"]] * 2
    path = write_scenes(tmp_path / "b.parquet", boxes, names, kind=Value("string"))
    sections = dict(data={"path": path, "held_out": path}, finetune={"max_steps": 2}, eval={"samples": 0})
    model = rt_detr(image_size=LARGE_SIDE, id2label={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    assert prune(command="validate", model=model.model, **sections)[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "a rt_detr scores classes in its base model too, whose weights are for 3, and the data has 2: fox, o" in line
    # What the message says works.
    options = dict(id2label={0: "fox", 1: "ox"}, ignore_mismatched_sizes=True)
    changed = RTDetrForObjectDetection.from_pretrained(tmp_path / "model", **options)
    assert prune(command="validate", model=changed, **sections)[0] == 0, capsys.readouterr().err
    # Random weights have no classes yet.
    sections |= {"finetune": {}, "output": {"path": str(tmp_path / "other")}}
    assert prune("dms.pipeline=np", command="validate", model=model, **sections)[0] == 0, capsys.readouterr().err
