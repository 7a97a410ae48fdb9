"""Folders that an encoder, a convolutional network or a decoder is saved in, each way of loading them in a process."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers import fresh
from helpers.encoders import DIMS, HEADS, PER_LAYER_ONLY, RELATIVES, STACKED, dims_of, possible
from helpers.laws import (
    SHIPPED,
    batch_for,
    searched,
    tiny,
)
from helpers.marks import slow
from helpers.tiny import relative_difference
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    ViTForImageClassification,
)

from hf_dms import prune
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.verify import outputs_of

# Decoders are loaded here too: a fresh process takes seconds, another model in it hardly any time.
DECODERS = ("Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Gemma", "Gemma2", "Gemma3")
SAVED = (*HEADS, *RELATIVES, *STACKED, *(getattr(transformers, f"{name}ForCausalLM") for name in DECODERS))
BY_ARCH = [list(heads) for _, heads in itertools.groupby(SAVED, lambda head: head.config_class)]


def heads_by_layout(by_arch):
    """Every head per layer; those that can be stock in one of the two layouts, in turns."""
    heads = [head for heads in by_arch for head in heads]
    stock = [head for head in heads if head not in PER_LAYER_ONLY]
    return {"uniform": stock[::2], "padded": stock[1::2], "per_layer": heads}


# Base models of other architectures are loaded from their classifiers' folders.
USUAL = ("BertModel", "ViTModel", "ResNetModel", "ForSequenceClassification", "ForImageClassification")
USUAL += ("ForObjectDetection", "ForCausalLM")
PARTS = {
    "usual heads": [[head for head in heads if head.__name__.endswith(USUAL)] for heads in BY_ARCH],
    "all": BY_ARCH,
}


def auto_of(head):
    _, task, name = head.__name__.partition("For")  # with a teacher: the same Auto class, which reads `architectures`
    return f"AutoModelFor{name.removesuffix('WithTeacher')}" if task else "AutoModel"


def saved(head, layout, folder, **overrides):
    """A folder, and beside it a batch and what the model in it computes."""
    model = tiny(head, **overrides)
    dims = None
    if not possible(head, DIMS, layout):
        dims = tuple(dim for dim in dims_of(head) if possible(head, (dim,), layout))
    searched(model, layout=layout, share=0.6, prune=dims)
    inputs = batch_for(model)
    pruned = prune(model, inputs=inputs)
    save_pruned(pruned, folder, inputs=inputs)
    save_file(inputs, f"{folder}.inputs")
    save_file({"expected": outputs_of(pruned, inputs).contiguous()}, f"{folder}.outputs")
    job = {"folder": str(folder), "auto": auto_of(head), "model_type": pruned.config.model_type}
    return job | {"head": head.__name__}


@pytest.fixture(scope="module", params=slow(*PARTS))
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        layout: [saved(head, layout, root / f"{layout}-{head.__name__}") for head in heads]
        for layout, heads in heads_by_layout(PARTS[request.param]).items()
    }


LOAD = """
import json, sys
sys.modules["hf_dms"] = None  # as if it were not installed
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    model = getattr(transformers, job["auto"]).from_pretrained(job["folder"], **job.get("options", {})).eval()
    assert model.config.model_type == job["model_type"], model.config.model_type
    expected = load_file(job["folder"] + ".outputs")["expected"]
    with torch.no_grad():
        output = model(**load_file(job["folder"] + ".inputs"))
    found = output["logits"] if "logits" in output else output[0]
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, (job, difference)
    print(type(model).__module__, type(model).__name__)
"""


@pytest.fixture(scope="module")
def without_hf_dms(folders, tmp_path_factory):
    """Classes that a process without hf_dms loads the folders with: of the stock ones, and of the per-layer ones."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    stock = folders["uniform"] + folders["padded"]
    trusted = [job | {"options": {"trust_remote_code": True}} for job in folders["per_layer"]]
    result = fresh.run(["-c", LOAD, json.dumps(stock + trusted)], home, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    classes = result.stdout.splitlines()
    return classes[: len(stock)], classes[len(stock) :]


def test_uniform_and_padded_folders_are_stock(folders, without_hf_dms):
    classes, _ = without_hf_dms
    assert [line.rpartition(" ")[2] for line in classes] == [
        job["head"] for layout in ("uniform", "padded") for job in folders[layout]
    ]
    assert all(line.startswith("transformers.models.") for line in classes)


def test_per_layer_folders_load_with_trust_remote_code_without_hf_dms(folders, without_hf_dms):
    _, classes = without_hf_dms
    assert [line.rpartition(" ")[2] for line in classes] == [f"Dms{job['head']}" for job in folders["per_layer"]]
    assert all(line.startswith("transformers_modules.") for line in classes)


def test_auto_map_names_a_class_for_every_head(folders):
    for job in folders["per_layer"]:
        classes = json.loads((Path(job["folder"]) / "config.json").read_text())["auto_map"]
        family = job["model_type"].removeprefix("dms_")
        assert {
            "AutoConfig",
            *(auto_of(head) for head in SAVED if head.config_class.model_type == family),
        } <= set(classes)


def written_by(model, inputs):
    """What the base model within a model computes: in an RT-DETR, whose decoder uses its head's boxes, up to there."""
    output = model.base_model(**inputs)
    in_boxes = model.config.model_type == "dms_rt_detr"
    return (output.encoder_last_hidden_state[-1] if in_boxes else output.last_hidden_state).detach()


def test_a_per_layer_folder_loads_as_what_was_saved_and_under_other_heads(folders):
    for job in folders["per_layer"]:
        auto, inputs = getattr(transformers, job["auto"]), load_file(job["folder"] + ".inputs")
        whole, base = auto.from_pretrained(job["folder"]), transformers.AutoModel.from_pretrained(job["folder"])
        assert f"{type(whole).__module__} {type(whole).__name__}" == f"hf_dms.cut.modeling_dms Dms{job['head']}"
        assert (
            relative_difference(outputs_of(whole, inputs), load_file(job["folder"] + ".outputs")["expected"]) < SHIPPED
        )
        found, expected = written_by(base, inputs), written_by(whole, inputs)
        assert relative_difference(found, expected) < SHIPPED
        base_folder = job["folder"] + ".base"
        base.save_pretrained(base_folder)
        again = auto.from_pretrained(base_folder)
        assert relative_difference(written_by(again, inputs), expected) < SHIPPED


def test_saving_a_per_layer_model_again_gives_the_same_folder(folders, tmp_path):
    for job in folders["per_layer"]:
        auto, folder = getattr(transformers, job["auto"]), tmp_path / Path(job["folder"]).name
        auto.from_pretrained(job["folder"]).save_pretrained(folder)
        assert (folder / "config.json").read_text() == (Path(job["folder"]) / "config.json").read_text()
        first, second = (load_file(f"{path}/model.safetensors") for path in (job["folder"], folder))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("head", [BertForSequenceClassification, ViTForImageClassification])
def test_a_per_layer_model_is_used_as_any_other(head, folders):
    (job,) = [job for job in folders["per_layer"] if job["folder"].endswith(f"-{head.__name__}")]
    inputs = load_file(job["folder"] + ".inputs")
    model = getattr(transformers, job["auto"]).from_pretrained(job["folder"]).eval()
    logits = model(**inputs).logits.detach()
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    assert relative_difference(output.logits.detach(), logits) < SHIPPED
    heads = [attention.shape[1] for attention in output.attentions]
    layers = [model.config.per_layer_config[i] for i in range(len(heads))]
    assert heads == [layer.num_attention_heads for layer in layers]
    assert len(set(heads)) > 1
    model.train()(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    fresh = type(model)._from_config(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.isfinite().all() and parameter.abs().max() < 5 for parameter in fresh.parameters())
