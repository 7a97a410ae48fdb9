"""Classifiers with trained heads, from recipe to folder: classes, colours and padding are kept."""

import json

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from helpers.data import letters, write_rows
from helpers.laws import IMAGE
from helpers.tiny import TINY
from PIL import Image as Picture
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_dms.cli import main

ANIMALS = dict(enumerate(["cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lion", "mole", "newt"]))
NAMED = {"id2label": ANIMALS, "label2id": {name: number for number, name in ANIMALS.items()}}


@pytest.fixture
def prune(tmp_path):
    """A function that writes a recipe for a folder and data, and runs it; returns (exit code, output folder)."""

    def run(model, task, data, *overrides, command="prune"):
        values = {
            "model": {"path": str(model), "task": task, "dtype": "float32"},
            "data": {"path": str(data), "held_out": str(data), "sequence_length": 16},
            "dms": {"target": 0.7, "warmup_steps": 2, "resource_scope": "layers"},
            "train": {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
            "output": {"path": str(tmp_path / "out")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return main([command, str(tmp_path / "recipe.yaml"), *overrides]), tmp_path / "out"

    return run


def grey_vit(folder):
    config = ViTConfig(**IMAGE | {"num_channels": 1} | NAMED)
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder)
    return model, processor


def test_a_grey_classifier_keeps_its_twelve_classes_and_is_right_about_its_own_predictions(prune, tmp_path):
    model, processor = grey_vit(tmp_path / "vit")
    images = [Picture.effect_noise((12, 12), 40 * i) for i in range(1, 13)]
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt", image_mean=[0.5], image_std=[0.5])["pixel_values"]
        numbers = model(pixels).logits.argmax(-1).tolist()
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": images, "label": numbers}, features=features).to_parquet(tmp_path / "a.parquet")
    code, out = prune(tmp_path / "vit", "image-classification", tmp_path / "a.parquet")
    assert code == 0
    assert json.loads((out / "dms_report.json").read_text())["dense"]["accuracy"] == 1.0
    pruned = AutoModelForImageClassification.from_pretrained(out)
    assert (pruned.config.id2label, pruned.config.num_channels) == (ANIMALS, 1)
    assert pruned.num_parameters() < model.num_parameters()


def llama_without_padding(folder):
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(**{key: value for key, value in TINY.items() if key not in ("num_labels", "pad_token_id")} | NAMED)
    ).save_pretrained(folder)
    letters(pad_token=None).save_pretrained(folder)
    return folder


def test_a_decoder_without_a_padding_token_is_pruned_and_then_has_one(prune, tmp_path):
    rows = [{"text": "abcdefghijkl"[i:], "label": ANIMALS[i].upper()} for i in range(12)]
    data = write_rows(tmp_path / "a.csv", rows)
    code, out = prune(llama_without_padding(tmp_path / "llama"), "text-classification", data)
    assert code == 0
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    assert (pruned.config.id2label, pruned.config.pad_token_id) == (ANIMALS, 2)
    assert main(["eval", str(out), "--data", data]) == 0
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["wolf", "cat"], "data.label_column: the labels are cat, wolf; the model has the classes cat (0), dog (1)"),
        ([0, 12], "data.label_column: the labels are 0, 12; the model has the classes cat (0), dog (1)"),
        ([0.5, 1.0], "row 1 of"),
    ],
)
def test_labels_that_are_no_classes_are_found_by_validate(prune, labels, message, tmp_path, capsys):
    data = write_rows(tmp_path / "a.jsonl", [{"text": "abc", "label": label} for label in labels])
    folder = llama_without_padding(tmp_path / "llama")
    assert prune(folder, "text-classification", data, command="validate")[0] == 2
    assert message in capsys.readouterr().err


def test_a_head_for_regression_is_refused_by_validate(prune, tmp_path, capsys):
    config = LlamaConfig(**TINY | {"num_labels": 1, "problem_type": "regression"})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "llama")
    letters().save_pretrained(tmp_path / "llama")
    data = write_rows(tmp_path / "a.jsonl", [{"text": "abc", "label": 0.5}] * 4)
    assert prune(tmp_path / "llama", "text-classification", data, command="validate")[0] == 2
    assert "the head is for regression (1 outputs); hf_dms takes heads for one class" in capsys.readouterr().err
