"""Mistakes in recipe, configs, tokenizer, weight files and data are reported by `validate`, and before any search."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers.laws import NAMES, SIZES
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY
from PIL import Image as Picture
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP

from hf_dms import DMSConfig, HfDmsError, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cli import main
from hf_dms.cut.verify import dummy_inputs
from hf_dms.refit.layerwise import LayerWalk
from hf_dms.refit.repairable import check_repairable
from hf_dms.refit.writes import find_stream_modules

SMALL = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4)


# ---- models and data that are not what they should be, made in a folder; the overrides are returned ------------------
def copy_of_dense(folder: Path, dense: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.save_pretrained(folder / "model", max_shard_size="10KB")
    save_tokenizer(folder / "model")
    return folder / "model"


def missing_shard(folder, dense):
    model = copy_of_dense(folder, dense)
    sorted(model.glob("model-*.safetensors"))[1].unlink()
    return [f"model.path={model}"]


def truncated_shard(folder, dense):
    model = copy_of_dense(folder, dense)
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    return [f"model.path={model}"]


def truncated_header(folder, dense):
    model = copy_of_dense(folder, dense)
    shard = sorted(model.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:20])
    return [f"model.path={model}"]


def other_weights(folder, dense):
    model = copy_of_dense(folder, dense)
    LlamaConfig(**(TINY | {"intermediate_size": TINY["intermediate_size"] + 8})).save_pretrained(model)
    return [f"model.path={model}"]


def no_weights(folder, dense):
    model = copy_of_dense(folder, dense)
    for file in model.glob("model*"):
        file.unlink()
    return [f"model.path={model}"]


def a_key_of_another_type(file: str, key: str, value: object):
    def change(folder, dense):
        path = copy_of_dense(folder, dense) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        return [f"model.path={path.parent}"]

    return change


def images(folder: Path, model_class, config) -> list[str]:
    model_class(config).save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder / "model")
    for name, level in (("dark", 20), ("light", 200)):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            Picture.new("RGB", (8, 8), (level + number,) * 3).save(folder / "images" / name / f"{number}.png")
    data = f"{{path: {folder / 'images'}, held_out: 0.25}}"
    return [f"model.path={folder / 'model'}", "model.task=image-classification", f"data={data}", "eval=null"]


PIXELS = dict(image_size=12, patch_size=4, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1})


def truncated_image(folder, dense):
    overrides = images(folder, ViTForImageClassification, ViTConfig(**(SMALL | PIXELS)))
    file = folder / "images" / "light" / "7.png"
    file.write_bytes(file.read_bytes()[:40])
    return overrides


def texts(folder: Path, labels=("no", "yes"), held_out: dict | None = None, names=("no", "yes")) -> list[str]:
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = BertConfig(**SMALL, vocab_size=TINY["vocab_size"], max_position_embeddings=32, **classes)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    rows = [{"text": WORDS[i % 9], "label": labels[i % len(labels)]} for i in range(20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text(json.dumps(held_out or {"text": "w1", "label": labels[0]}) + "\n")
    data = f"{{path: {folder / 'texts.jsonl'}, held_out: {folder / 'held_out.jsonl'}}}"
    return [f"model.path={folder / 'model'}", "model.task=text-classification", f"data={data}", "eval=null"]


def held_out_without_labels(folder, dense):
    return texts(folder, held_out={"text": "w1"})


def a_class_that_the_head_lacks(folder, dense):
    return texts(folder, labels=("no", "yes", "maybe"))


def untrained_head(folder, dense):
    overrides = texts(folder)
    AutoModel.from_pretrained(folder / "model").save_pretrained(folder / "model")
    return overrides


def output_below_a_file(folder, dense):
    return [f"output.path={folder / 'text.jsonl' / 'out'}"]


def output_where_none_can_be_made(folder, dense):
    return ["output.path=/proc/hf_dms/out"]


def output_is_the_model(folder, dense):
    model = copy_of_dense(folder, dense)
    return [f"model.path={model}", f"output.path={model}", "output.overwrite=true"]


def output_holds_the_model(folder, dense):
    model = copy_of_dense(folder / "models", dense)
    return [f"model.path={model}", f"output.path={model.parent}/../models", "output.overwrite=true"]


def output_holds_the_data(folder, dense):
    (folder / "corpus").mkdir()
    (folder / "text.jsonl").rename(folder / "corpus" / "text.jsonl")
    corpus = folder / "corpus"
    return [f"data.path={corpus / 'text.jsonl'}", f"output.path={corpus}", "output.overwrite=true"]


def no_tokenizer(folder, dense):
    model = copy_of_dense(folder, dense)
    for file in model.glob("*token*"):
        file.unlink()
    return [f"model.path={model}"]


def option(*overrides):
    return lambda folder, dense: list(overrides)


BAD = {
    "missing shard": (missing_shard, "lacks model-00002-of-"),
    "truncated shard": (truncated_shard, "is damaged or cut short"),
    "truncated header": (truncated_header, "is damaged or cut short"),
    "weights of another config": (other_weights, "Is config.json that of the weights?"),
    "a config of another kind": (
        a_key_of_another_type("config.json", "model_type", ["llama"]),
        "model.path: No model can be read from",
    ),
    "a size that is a word": (
        a_key_of_another_type("config.json", "hidden_size", "x"),
        "model.path: No model can be read from",
    ),
    "a tokenizer of another kind": (
        a_key_of_another_type("tokenizer.json", "model", {"type": "Nope"}),
        "model.path: No tokenizer can be read from",
    ),
    "no tokenizer": (no_tokenizer, "The folder has no file of one: save that of the model there, by tokenizer.save_"),
    "no weights": (no_weights, "has no model.safetensors"),
    "untrained head": (untrained_head, "has no weights for classifier.bias, classifier.weight, which would be random"),
    "truncated image": (truncated_image, "cannot be decoded"),
    "held-out rows without labels": (held_out_without_labels, "has no column 'label'"),
    "a label that is no class": (a_class_that_the_head_lacks, "data.label_column: the labels are maybe, no, yes"),
    "recover evaluates": (
        option("recover={max_steps: 2, eval_strategy: steps, eval_steps: 1}"),
        "recover.eval_strategy, recover.load_best_model_at_end: there is no evaluation during this training",
    ),
    "finetune evaluates": (
        option("finetune={max_steps: 2, eval_strategy: epoch}"),
        "finetune.eval_strategy, finetune.load_best_model_at_end: there is no evaluation during this training",
    ),
    "a search that is all warm-up": (
        option("train.max_steps=5", "dms.warmup_steps=5"),
        "dms.warmup_steps = 5 and the search has 5 steps",
    ),
    "epochs that are all warm-up": (
        option("train.max_steps=-1", "train.num_train_epochs=0.1", "dms.warmup_steps=500"),
        "dms.warmup_steps = 500 and the search has ",
    ),
    "empty batches": (
        option("train.per_device_train_batch_size=0"),
        "train.per_device_train_batch_size must be at least 1, got 0.",
    ),
    "steps of no batches": (
        option("train.gradient_accumulation_steps=0"),
        "train.gradient_accumulation_steps must be at least 1, got 0.",
    ),
    "attention that does not exist": (
        option("model.attn_implementation=foo"),
        'model.attn_implementation: Specified `attn_implementation="foo"` is not supported.',
    ),
    "output below a file": (output_below_a_file, "output.path: no folder can be made in"),
    "output where none can be made": (output_where_none_can_be_made, "output.path: no folder can be made in /proc"),
    "output is the model": (output_is_the_model, "which the result is made from and which it would replace"),
    "output holds the model": (output_holds_the_model, "which the result is made from and which it would replace"),
    "output holds the data": (output_holds_the_data, "which the result is made from and which it would replace"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_recipe_that_cannot_end_well_ends_before_its_search(recipe, dense, tmp_path, kind, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it was trained")

    monkeypatch.setattr(Trainer, "train", refuse)
    make, message = BAD[kind]
    overrides = make(tmp_path, dense)
    files = sorted(tmp_path.rglob("*"))
    for command in ("validate", "prune"):
        capsys.readouterr()
        assert recipe(*overrides, command=command)[0] == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize(("step", "says"), [(10, True), (1, False)])
def test_multiples_that_are_too_coarse_for_the_target_are_told_before_the_search(recipe, step, says, caplog):
    overrides = ["dms.prune=[mlp]", "dms.target=0.95", f"dms.round_to={{mlp: {step}}}"]
    assert recipe(*overrides, command="validate")[0] == 0
    assert ("makes the cut smaller than asked" in caplog.text) == says


def test_layers_that_cannot_be_repaired_are_found_before_the_search(recipe, capsys, monkeypatch):
    forward = LlamaMLP.forward
    for mlp in (LlamaMLP, MistralMLP):  # a small Llama with few heads is a Mistral
        monkeypatch.setattr(mlp, "forward", lambda self, inputs: 0.5 * forward(self, inputs))
    asked = {
        "recover.repair": ["recover={repair: {}}"],
        "dms.search_over": ["dms.search_over=refitted", "dms.pipeline=p-"],
    }
    for (name, overrides), command in itertools.product(asked.items(), ("validate", "prune")):
        assert recipe(*overrides, command=command)[0] == 2
        assert f"{name}: what self_attn.o_proj, mlp.down_proj of a llama" in capsys.readouterr().err


def test_what_is_good_in_these_recipes_passes(recipe, dense, tmp_path, capsys):
    """Without their mistakes the recipes above pass, so each fails for the mistake that its case names."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "images").mkdir()
    vit = ViTForImageClassification, ViTConfig(**(SMALL | PIXELS))
    good = [
        [f"model.path={copy_of_dense(tmp_path, dense)}"],
        texts(tmp_path / "texts", names=("no", "yes", "maybe")),  # one class does not occur
        images(tmp_path / "images", *vit),
        ["train.eval_strategy=steps", "train.eval_steps=2", "recover.max_steps=1", "finetune.max_steps=1"],
        ["output.path=a/new/folder"],
    ]
    for overrides in good:
        code, _ = recipe(*overrides, command="validate")
        assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", SIZES)
def test_whether_a_model_can_be_repaired_is_known_without_its_weights(name):
    def answer(function, *args):
        try:
            function(*args)
        except HfDmsError as error:
            return str(error)

    sizes = {NAMES.get(name, {}).get(key, key): value for key, value in SIZES[name].items()}
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[name](**sizes)).eval()
    bound = bind(spec_for(model.config), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.3)
        of_weights = answer(lambda: find_stream_modules(LayerWalk(model, bound, [dummy_inputs(model)])))
    state = torch.get_rng_state()
    assert answer(check_repairable, model.to("meta"), bound) == of_weights
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_not_saved_over_the_one_it_was_cut_from(tmp_path):
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    before = {file.name: file.read_bytes() for file in (tmp_path / "dense").iterdir()}
    with pytest.warns(UserWarning, match="no search has run"):
        pruned = prune(model, DMSConfig(target=0.7))
    for folder in (tmp_path / "dense", tmp_path):
        with pytest.raises(HfDmsError, match="which the result is made from and which it would replace"):
            save_pruned(pruned, folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "dense").iterdir()} == before
    save_pruned(pruned, tmp_path / "pruned")
    again = type(pruned).from_pretrained(tmp_path / "pruned")
    with pytest.raises(HfDmsError, match="which the result is made from"):
        save_pruned(again, tmp_path / "pruned", overwrite=True)


def test_a_cut_by_a_plan_does_not_replace_the_files_it_cuts(recipe, dense, tmp_path, capsys):
    model = copy_of_dense(tmp_path, dense)
    assert recipe("dms.pipeline=p-", "train.max_steps=3", "eval=null")[0] == 0
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    for output in (model, tmp_path):
        options = [f"model.path={model}", f"output.path={output}", "output.overwrite=true"]
        assert main(["prune", "--plan", str(tmp_path / "out"), *options]) == 2
        assert "which the result is made from and which it would replace" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
