"""`hf-dms prune` on a tiny folder: each pipeline, resuming, refusals, and no half-written results."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from helpers.laws import IMAGE, SIZES, STAGES, TEXT
from helpers.marks import ordinary_if
from helpers.recipes import killed_in, save_tokenizer
from helpers.schema import mistakes
from PIL import Image as Picture
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import hf_dms.experiment.own_data
import hf_dms.experiment.run
import hf_dms.experiment.stages
import hf_dms.report.numbers
from hf_dms import DMSTrainer
from hf_dms.archs.bind import bind
from hf_dms.archs.llama import LLAMA
from hf_dms.cli import main
from hf_dms.cut.plan import load_plan


@pytest.fixture
def classifiers(tmp_path):
    """A function that writes a recipe for texts or images and runs the command line on it."""
    save_tokenizer(tmp_path / "bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")  # without a head
    rows = [{"text": f"w{i % 9} w{i % 7}", "label": ["no", "yes"][i % 2]} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ViTModel(ViTConfig(**(IMAGE | {"num_channels": 3}))).save_pretrained(tmp_path / "vit")
    ConvNextModel(ConvNextConfig(**(STAGES | {"num_channels": 3}))).save_pretrained(tmp_path / "convnext")
    ResNetModel(ResNetConfig(**SIZES["resnet"] | {"num_channels": 3})).save_pretrained(tmp_path / "resnet")
    for name, side in (("vit", 12), ("convnext", 16), ("resnet", 16)):
        ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(tmp_path / name)
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    pictures = [Picture.new("L", (8, 8), 6 * i) for i in range(40)]
    images = Dataset.from_dict({"image": pictures, "label": [int(i >= 20) for i in range(40)]}, features=features)
    images.to_parquet(tmp_path / "images.parquet")

    def run(model, *overrides, command="prune"):
        text = model == "bert"
        values = {
            "model": {
                "path": str(tmp_path / model),
                "task": "text-classification" if text else "image-classification",
                "dtype": "float32",
            },
            "data": {"path": "texts.jsonl" if text else "images.parquet", "held_out": 0.25, "sequence_length": 16},
            "finetune": {"max_steps": 4},
            "dms": {"target": 0.7, "warmup_steps": 2, "layout": "per_layer", "resource_scope": "layers"},
            "train": {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
            "recover": {"max_steps": 3, "distillation": {"weight": 0.5}},
            "output": {"path": str(tmp_path / "out")},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        return main([command, str(file), *overrides]), tmp_path / "out"

    return run


def test_a_comparison_gives_a_new_head_the_same_weights_each_time(classifiers, tmp_path):
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        out = tmp_path / f"table-{seed}"
        classifiers("bert", "compare.strategies={random: {}}", "recover=null", f"output.path={out}", command="compare")
        heads.append(load_file(out / "dense/finetune/checkpoint-4/model.safetensors")["classifier.weight"])
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("model", "resource"),
    ordinary_if(
        lambda model, resource: (model in ("bert", "convnext")) == (resource == "params"),
        itertools.product(["bert", "vit", "convnext", "resnet"], ["params", "macs"]),
    ),
)
def test_a_classifier_is_fine_tuned_pruned_and_recovered(classifiers, model, resource, capsys):
    code, out = classifiers(model, f"dms.resource={resource}")
    assert code == 0
    report = json.loads((out / "dms_report.json").read_text())
    auto = AutoModelForSequenceClassification if model == "bert" else AutoModelForImageClassification
    pruned = auto.from_pretrained(out)
    assert report["pruned"]["num_params"] == pruned.num_parameters() < report["dense"]["num_params"]
    assert pruned.config.id2label == ({0: "no", 1: "yes"} if model == "bert" else {0: "dark", 1: "light"})
    for column in ("dense", "pruned", "recovered"):
        assert 0 <= report[column]["accuracy"] <= 1
    assert report["recovered"]["difference"] == report["recovered"]["accuracy"] - report["dense"]["accuracy"]
    assert report["protocol"] == f"10 held-out {'texts' if model == 'bert' else 'images'}"
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {'text' if model == 'bert' else 'image'}-classification" in card
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed
    assert f"{auto.__name__}.from_pretrained" in printed
    assert_a_report_for_people_and_programs(out, report)
    assert len(report["samples"]) == 4
    for sample in report["samples"]:
        assert {sample["label"], *sample["outputs"].values()} <= set(pruned.config.id2label.values())
        assert list(sample["outputs"]) == list(sample["probabilities"]) == ["dense", "recovered"]
        assert all(0.5 <= probability <= 1 for probability in sample["probabilities"].values())
        assert sample["input"].startswith("w" if model == "bert" else "data:image/png;base64,")


@pytest.mark.parametrize(
    ("model", "layout"),
    ordinary_if(
        lambda model, layout: (model, layout) == ("convnext", "uniform"),
        itertools.product(["bert", "vit", "convnext", "resnet"], ["per_layer", "uniform"]),
    ),
)
def test_a_classifier_found_in_a_supernet_costs_what_the_original_does(classifiers, model, layout):
    options = ["dms.pipeline=np", "model.supernet={width: 2, depth: 1.5}", "dms.target=1.0", "recover={max_steps: 60}"]
    code, out = classifiers(model, *options, "finetune=null", "dms.resource=macs", f"dms.layout={layout}")
    assert code == 0
    report = json.loads((out / "dms_report.json").read_text())
    auto = AutoModelForSequenceClassification if model == "bert" else AutoModelForImageClassification
    found = auto.from_pretrained(out)
    assert report["pruned"]["num_params"] == found.num_parameters()
    limit = report["original"]["macs_per_token"]
    assert report["dense"]["macs_per_token"] > 1.4 * limit  # the stem of a ResNet is not pruned
    assert 0.6 * limit < report["pruned"]["macs_per_token"]  # the target counts the layers only
    assert found.config.model_type.startswith("dms_") == (layout == "per_layer")
    assert_a_report_for_people_and_programs(out, report)
    assert "dense" not in (out / "README.md").read_text() + (out / "report.html").read_text().partition("How it was")[0]


def assert_a_report_for_people_and_programs(out, report):
    assert mistakes(report) == []
    page = (out / "report.html").read_text()
    assert all(f"{report['pruned'][key]:,}" in page for key in ("num_params", "macs_per_token"))
    folder = str(out.parent)
    assert folder not in page + json.dumps(report) + (out / "README.md").read_text()


def test_no_held_out_example_is_in_the_report_if_none_is_wanted(classifiers, capsys):
    options = ("finetune.max_steps=1", "train.max_steps=3", "recover=null")
    _, out = classifiers("bert", "eval.samples=0", *options)
    assert json.loads((out / "dms_report.json").read_text())["samples"] == []
    assert classifiers("bert", "eval.samples=-1", *options)[0] == 2
    assert_matches("eval.samples must be at least 0, got -1", capsys.readouterr().err)


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_a_head_that_nothing_has_trained_is_refused(classifiers, model, capsys):
    assert classifiers(model, "finetune=null")[0] == 2
    assert_matches("no weights for classifier.bias, classifier.weight", capsys.readouterr().err)


def test_a_classifier_killed_in_its_recover_stage_ends_the_same(classifiers, monkeypatch):
    _, out = classifiers("vit")
    whole = AutoModelForImageClassification.from_pretrained(out).state_dict()
    shutil.rmtree(out)
    with killed_in(monkeypatch, hf_dms.experiment.run, "recover_steps"):
        classifiers("vit")
    assert classifiers("vit")[0] == 0
    resumed = AutoModelForImageClassification.from_pretrained(out).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "recover={distillation: {weight: 2}, max_steps: 1}",
            r"recover.distillation.weight must be in \(0, 1\], got 2",
        ),
        ("recover={distillation: {heat: 2}, max_steps: 1}", "Unknown key recover.distillation.heat"),
        ("recover={repair: {examples: 0}}", "recover.repair.examples must be at least 1, got 0"),
        ("recover={repair: {ridge: 0}}", "recover.repair.ridge must be above 0, got 0"),
        ("recover={repair: {epochs: -1}}", "recover.repair.epochs must be 0 or more, got -1"),
        ("recover={repair: {epochs: 1, examples: 4}}", "recover.repair.examples must be more than 4, got 4"),
        ("recover={repair: true}", "recover.repair must be a section with keys, or {} for its defaults; got True"),
        ("recover={float32: maybe}", "recover.float32 must be true or false, got 'maybe'"),
        ("model.task=poetry", "model.task must be one of text-generation, text-classification, image-classification"),
        ("data.label_column=mood", "the data has no column 'mood'. It has text, label"),
    ],
)
def test_a_mistake_in_a_classifiers_recipe_is_named(classifiers, override, message, capsys):
    assert classifiers("bert", override, command="validate")[0] == 2
    assert message.replace("\\", "") in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("pipeline", "layout"),
    ordinary_if(
        lambda pipeline, layout: (pipeline == "np") == (layout == "uniform"),
        itertools.product(["p", "np", "p-"], ["uniform", "per_layer"]),
    ),
)
def test_each_pipeline_and_layout_ends_in_a_folder_that_meets_the_budget(recipe, pipeline, layout, capsys):
    code, out = recipe(f"dms.pipeline={pipeline}", f"dms.layout={layout}")
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(out)  # hf_dms is imported here; test_modeling_dms has the rest
    report = json.loads((out / "dms_report.json").read_text())
    num_params = sum(parameter.numel() for parameter in model.parameters())
    assert report["pruned"]["num_params"] == num_params <= 0.6 * report["dense"]["num_params"]
    assert model.config.use_cache
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in out.iterdir()}
    assert not out.with_name("out.unfinished").exists()
    printed = capsys.readouterr().out
    assert "held-out perplexity" in printed
    assert "from_pretrained" in printed
    assert_a_report_for_people_and_programs(out, report)
    (sample,) = report["samples"]
    assert sample["input"] == "w1 w2"
    assert {text[:5] for text in sample["outputs"].values()} == {"w1 w2"}
    assert list(sample["outputs"]) == ["dense", "pruned"]
    assert sample["outputs"]["pruned"] in printed


def test_several_prompts_are_continued_by_both_models(recipe):
    code, out = recipe("eval.prompt=[w3, w4 w5]", "dms.pipeline=p-")
    assert code == 0
    samples = json.loads((out / "dms_report.json").read_text())["samples"]
    assert [sample["input"] for sample in samples] == ["w3", "w4 w5"]
    assert all(set(sample["outputs"]) == {"dense", "pruned"} for sample in samples)


def test_a_padded_model_is_stock_and_told_with_and_without_its_zeros(recipe):
    code, out = recipe("dms.layout=padded", "dms.pipeline=p-", "dms.prune=[kv, mlp]", "dms.target=0.75")
    assert code == 0
    report = json.loads((out / "dms_report.json").read_text())
    assert report["model_class"] in ("LlamaForCausalLM", "MistralForCausalLM")
    pruned = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert report["pruned"]["kept_num_params"] <= 0.75 * report["dense"]["num_params"]
    assert report["pruned"]["kept_num_params"] <= report["pruned"]["num_params"] == pruned
    assert "| parameters without padding |" in (out / "README.md").read_text()


def test_macs_are_counted_at_the_sequence_length_of_the_budget(recipe):
    _, out = recipe("dms.resource=macs", "dms.layout=per_layer", "dms.pipeline=p-")
    short = json.loads((out / "dms_report.json").read_text())
    shutil.rmtree(out)
    _, out = recipe("dms.resource=macs", "dms.layout=per_layer", "dms.pipeline=p-", "dms.sequence_length=160")
    report = json.loads((out / "dms_report.json").read_text())
    assert report["dense"]["macs_per_token"] > short["dense"]["macs_per_token"]
    assert report["pruned"]["macs_per_token"] <= 0.6 * report["dense"]["macs_per_token"]


@pytest.mark.parametrize(("ramp", "verdict"), [("dms.gate_learning_rate=1e-5", "above"), ("dms.target=0.8", "below")])
def test_a_search_that_ends_off_its_target_is_said_wherever_its_result_is(recipe, ramp, verdict, capsys):
    options = [] if verdict == "above" else ["dms.gate_learning_rate=0.3", "dms.resource_weight=100"]
    code, out = recipe(ramp, *options)
    report = json.loads((out / "dms_report.json").read_text())
    assert code == 0
    assert report["outcome"]["verdict"] == verdict
    message = report["outcome"]["message"]
    assert f"{verdict} the target" in message
    places = [capsys.readouterr().out, (out / "README.md").read_text(), (out / "report.html").read_text()]
    assert main(["report", str(out)]) == 0
    for text in [*places, capsys.readouterr().out]:
        assert message in text
        assert "soft masks" in text
        assert f"{report['masks']['soft']['perplexity']:.2f}" in text


def test_a_random_network_is_not_called_dense(recipe, capsys):
    _, out = recipe("dms.pipeline=np")
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    for text in (capsys.readouterr().out, card, page):
        assert "random" in text
    assert "| | random | soft masks | pruned | pruned / random |" in card
    assert ">dense<" not in page.partition("What was cut")[0]
    assert "Its weights were random when the search began." in card


def test_recover_trains_the_cut_model(recipe):
    code, out = recipe("recover.max_steps=5", "recover.learning_rate=1e-3")
    report = json.loads((out / "dms_report.json").read_text())
    assert code == 0
    assert report["recovered"]["perplexity"] != report["pruned"]["perplexity"]


@pytest.mark.parametrize("pipeline", ["p", "p-"])
def test_repair_comes_before_training_and_each_is_measured(recipe, pipeline):
    options = [
        "recover.repair={examples: 6, interpolate: false}",
        "recover.max_steps=2",
        "recover.distillation={}",
        f"dms.pipeline={pipeline}",
    ]
    code, out = recipe(*options, "dms.layout=per_layer")
    report = json.loads((out / "dms_report.json").read_text())
    assert code == 0
    assert len({report[column]["perplexity"] for column in ("dense", "pruned", "repaired", "recovered")}) == 4
    assert "repaired" in (out / "README.md").read_text()


def test_repair_alone_trains_nothing(recipe, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it was trained")

    monkeypatch.setattr(hf_dms.experiment.stages, "train_", refuse)
    code, out = recipe("recover={repair: {}}", "dms.pipeline=p-")
    assert code == 0
    assert "recovered" not in json.loads((out / "dms_report.json").read_text())


def test_a_random_model_is_nothing_to_repair_towards(recipe, capsys):
    assert recipe("recover={repair: {}}", "dms.pipeline=np")[0] == 2
    assert_matches("need a trained dense model, and with pipeline np there is none", capsys.readouterr().err)


def test_the_plan_of_the_cut_is_written_beside_it(recipe, dense):
    _, out = recipe("dms.layout=per_layer")
    model = AutoModelForCausalLM.from_pretrained(dense)
    plan, layout = load_plan(out, bind(LLAMA, model))
    report = json.loads((out / "dms_report.json").read_text())
    layers = plan.kept["layers"][0].tolist()
    assert layout == "per_layer"
    for name in ("kv", "mlp"):
        kept = [len(row) if layer in layers else 0 for layer, row in enumerate(plan.kept[name])]
        assert kept == report["sizes"][name]


def test_frozen_weights_are_those_of_the_dense_model(recipe, dense):
    code, out = recipe("dms.pipeline=p-", "dms.prune=[layers]")
    assert code == 0
    kept = AutoModelForCausalLM.from_pretrained(out).state_dict()
    whole = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    assert torch.equal(kept["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_a_finished_output_is_left_alone(recipe, capsys):
    _, out = recipe()
    before = (out / "dms_report.json").stat().st_mtime_ns
    code, _ = recipe()
    assert code == 0
    assert "finished already" in capsys.readouterr().out
    assert (out / "dms_report.json").stat().st_mtime_ns == before


def test_a_finished_output_of_other_data_is_no_result_of_this_recipe(recipe, tmp_path, capsys):
    recipe()
    text = tmp_path / "text.jsonl"
    text.write_text(text.read_text().replace("w3", "w4"))
    assert recipe()[0] == 2
    assert "another recipe: the content of data.path has changed." in capsys.readouterr().err


def test_a_finished_output_of_another_recipe_is_no_result_of_this_one(recipe, dense, tmp_path, capsys):
    _, out = recipe("train.learning_rate=1e-4")
    before = (out / "dms_report.json").read_text()
    shutil.copytree(dense, tmp_path / "other")
    capsys.readouterr()
    for override, change in {
        "dms.target=0.8": "dms.target was 0.6, is 0.8",
        "dms.round_to={mlp: 2}": "dms.round_to was {}, is {'mlp': 2}",
        f"model.path={tmp_path / 'other'}": "model.path was .../dense",
        "train.max_steps=9": "train.max_steps was 8, is 9",
        "train.weight_decay=0.1": "train.weight_decay was left out, is 0.1",
        "dms.pipeline=p-": "dms.pipeline was p, is p-",
        "recover={repair: {examples: 4}}": "recover.repair.examples was left out, is 4",
        "recover={}": "recover was without a training",
    }.items():
        assert recipe("train.learning_rate=1e-4", override)[0] == 2
        message = capsys.readouterr().err
        assert "holds the finished result of another recipe" in message
        assert change in message
    assert recipe("train.learning_rate=1e-4", "train.logging_steps=3", "eval.new_tokens=2")[0] == 0
    printed = capsys.readouterr().out
    assert "finished already" in printed
    assert "eval.new_tokens was 3, is 2: a finished result is not measured again." in printed
    assert (out / "dms_report.json").read_text() == before


@pytest.mark.parametrize("override", ["dms.target=8K", "dms={sizes: {mlp: 12}, warmup_steps: 2}"])
def test_what_a_run_fills_in_is_no_other_recipe(override, recipe, tmp_path, capsys):
    shutil.copy(tmp_path / "text.jsonl", more := tmp_path / "more.jsonl")
    options = [override, "recover={}", "train.bf16=true", f"data.mix={{{more}: 1}}"]
    for _ in range(2):
        assert recipe(*options)[0] == 0
    assert "finished already" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "dms_report.json").read_text()
    assert recipe(*options, "recover.learning_rate=1")[0] == 2
    assert "recover.learning_rate was 0.0005, is 1" in capsys.readouterr().err


def test_a_cut_by_a_plan_is_no_result_of_a_recipe(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dms_report.json").write_text('{"format": 1, "proof": "tensors"}')
    assert recipe()[0] == 2
    assert "out was cut by a plan (hf-dms prune --plan), not by this recipe." in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(recipe, tmp_path, monkeypatch, capsys):
    train = ("train.max_steps=8", "train.save_steps=4")
    _, out = recipe(*train)
    whole = AutoModelForCausalLM.from_pretrained(out).state_dict()
    shutil.rmtree(out)
    with killed_in(monkeypatch, DMSTrainer, "_save_checkpoint", after=True):
        recipe(*train)
    assert not out.exists()
    assert recipe(*train, "dms.target=0.5")[0] == 2  # a changed recipe must not continue this search
    text = tmp_path / "text.jsonl"
    content = text.read_text()
    text.write_text(content.replace("w3", "w4"))
    capsys.readouterr()
    assert recipe(*train)[0] == 2  # nor may changed data
    assert f"search of another recipe: the content of {text} has changed." in capsys.readouterr().err
    text.write_text(content)
    assert recipe(*train)[0] == 0
    resumed = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_killed_when_all_was_saved_leaves_nothing_behind(recipe, monkeypatch, capsys):
    with killed_in(monkeypatch, hf_dms.experiment.run, "remove_unfinished"):
        recipe()
    out = recipe()[1]
    assert "is finished already" in capsys.readouterr().out
    assert (out / "dms_report.json").is_file()
    assert not out.with_name("out.unfinished").exists()


def test_a_recipe_may_ask_for_the_best_model(recipe):
    options = ["eval_strategy=steps", "eval_steps=2", "save_steps=2", "load_best_model_at_end=true"]
    code, out = recipe(*(f"train.{option}" for option in options), "dms.target=0.8", "dms.gate_learning_rate=0.1")
    assert code == 0
    assert json.loads((out / "dms_report.json").read_text())["search"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dms.target=0.0001", "dms.target = 0.0001 cannot be reached.*Raise the target to at least"),
        ("dms.prune=[heads]", "llama has no dim 'heads'. Its dims are kv, mlp, hidden, layers"),
        ("dms.protect={layers: [9]}", "the model has layers 0 to 2, got 9"),
        ("dms.round_to={mlp: 64}", "dms.round_to.mlp = 64: no multiple of it"),
        ("train.max_stepz=3", "Unknown key train.max_stepz. Did you mean train.max_steps?"),
        ("train.learning_rate=fast", "train.learning_rate must be a number"),
        ("train.max_steps=0", "train.max_steps is required"),
        ("train.fp16=true", "fp16=True scales the loss"),
        ("train.hub_token=hf_x", "train.hub_token: give hub.repo_id, and the token by `hf auth login` or HF_TOKEN"),
        ("train.push_to_hub=true", "train.push_to_hub: give hub.repo_id"),
        ("hub.repo_id=a/b/c", "'a/b/c' cannot be a repository on the Hub"),
        ("data.text_column=body", "the data has no column 'body'. It has text"),
        ("data.sequence_length=5000", "less than one sequence of 5000"),
        ("model.path=/nowhere/model", "model.path: No model can be read from '/nowhere/model'"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "prune"])
def test_a_mistake_ends_before_weights_are_loaded_and_leaves_nothing(
    recipe, override, message, command, capsys, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    code, out = recipe(override, command=command)
    assert code == 2
    assert_matches(message, capsys.readouterr().err)
    assert not out.exists()
    assert not out.with_name("out.unfinished").exists()


def test_an_unsupported_model_is_told_what_is_supported(recipe, tmp_path, capsys):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    code, _ = recipe(f"model.path={tmp_path / 'gpt2'}", command="validate")
    assert code == 2
    assert_matches("model type 'gpt2' is not supported. Supported: .*llama", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("config", "task"), [(BertConfig, "text-generation"), (LlamaConfig, "image-classification")], ids=["bert", "llama"]
)
def test_a_task_that_the_model_is_not_made_for_is_refused(recipe, config, task, tmp_path, capsys):
    config().save_pretrained(tmp_path / "model")
    assert recipe(f"model.path={tmp_path / 'model'}", f"model.task={task}", command="validate")[0] == 2
    assert_matches(f"model.task: there is no {task} model of type '{config.model_type}'", capsys.readouterr().err)


def test_an_empty_dataset_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": ""}\n')
    assert recipe(command="validate")[0] == 2
    assert_matches("has no text in column 'text'", capsys.readouterr().err)


def test_a_folder_that_is_not_ours_is_not_overwritten(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert recipe()[0] == 2
    assert_matches("exists and is not empty", capsys.readouterr().err)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_the_dense_model_s_own_texts_are_mixed_in_and_written_once(recipe, dense, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hf_dms.experiment.own_data, "HF_HOME", str(tmp_path / "cache"))
    seen, load = [], hf_dms.experiment.own_data.load_examples

    def keep(data, *args, **kwargs):
        examples = load(data, *args, **kwargs)
        seen.append((data, examples))
        return examples

    monkeypatch.setattr(hf_dms.experiment.own_data, "load_examples", keep)
    mix = ["data.mix={self: 1}", "data.own_sequences=9", "output.overwrite=true"]
    assert recipe(*mix, command="validate")[0] == 0
    assert not (tmp_path / "cache").exists()
    assert recipe(*mix)[0] == 0
    printed = capsys.readouterr().out
    assert "The dense model writes 9 texts of 16 tokens" in printed
    assert_matches(r"They are \d+ tokens, kept in", printed)
    (file,) = (tmp_path / "cache").rglob("*.jsonl")
    assert len(file.read_text().splitlines()) == 9
    assert recipe(*mix, "dms.target=0.7")[0] == 0
    assert "The dense model writes" not in capsys.readouterr().out
    (data, examples), _ = seen
    assert data.mix == {str(file): 1}
    assert examples.train.num_rows % 2 == 0
    assert json.loads((tmp_path / "out" / "dms_report.json").read_text())["recipe"]["data"]["mix"] == {"self": 1}
    model = LlamaForCausalLM.from_pretrained(dense)  # with other weights, texts are written again
    model.lm_head.weight.data *= 2
    model.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    assert recipe(*mix, f"model.path={tmp_path / 'other'}")[0] == 0
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.mix={self: 1}", "dms.pipeline=np"],
            "self is what the dense model writes, and with pipeline np it is ra",
        ),
        (
            ["data.mix={self: 1}", "model.task=text-classification"],
            "data.mix and the path self are for text-generation",
        ),
        (["data.path=self"], "data.held_out must be a file, a folder or a dataset if data.path is self, got 0.2"),
        (
            ["recover={max_steps: 1, data: {path: self, held_out: text.jsonl}}"],
            "recover.data: self is not possible there. Mix it into data",
        ),
    ],
)
def test_own_texts_that_cannot_be_are_refused(recipe, overrides, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe(*overrides, command="validate")[0] == 2
    assert_matches(message, capsys.readouterr().err)


def test_further_texts_are_measured_and_loss_there_is_said(recipe, tmp_path, capsys, monkeypatch):
    rows = [{"text": " ".join(f"w{(i * j) % 7}" for j in range(1, 40))} for i in range(1, 12)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(hf_dms.report.numbers, "PARTED", 0.0)
    code, out = recipe(f"eval.texts={{another: {tmp_path / 'other.jsonl'}}}", "recover={repair: {examples: 4}}")
    assert code == 0
    report = json.loads((out / "dms_report.json").read_text())
    assert mistakes(report) == []
    measured = report["texts"]["another"]
    assert list(measured) == ["dense", "pruned", "repaired"]
    for name, values in measured.items():
        assert values["perplexity"] != report[name]["perplexity"]
    assert measured["repaired"]["difference"] != 0
    printed = capsys.readouterr().out
    assert f"| perplexity on another | {measured['dense']['perplexity']:.2f} |" in printed
    assert_matches(r"The repaired model has \S+ times the dense perplexity on another, and \S+ times on the", printed)


def test_a_further_text_that_is_not_there_is_an_error(recipe, capsys):
    assert recipe("eval.texts={another: nowhere.jsonl}", command="validate")[0] == 2
    assert_matches("eval.texts.another: there is no file 'nowhere.jsonl'", capsys.readouterr().err)


def test_validate_says_ok(recipe, capsys):
    assert recipe(command="validate")[0] == 0
    assert "recipe.yaml: ok" in capsys.readouterr().out


def assert_matches(pattern: str, text: str) -> None:
    import re

    assert re.search(pattern.replace("?", r"\?").replace("[", r"\["), text.replace("\n", " ")), text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize("pruned", [20, 50])
def test_llama_7b_recipes_run_at_a_twentieth_of_the_size(pruned, tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=32000, hidden_size=832, intermediate_size=2236, num_hidden_layers=32, num_attention_heads=32,
        head_dim=26,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    assert 300e6 < sum(parameter.numel() for parameter in model.parameters()) < 360e6
    overrides = ["train.max_steps=6", "dms.warmup_steps=1", "data.sequence_length=32", "eval.examples=2"]
    overrides += [f"model.path={tmp_path / 'llama'}", f"output.path={tmp_path / 'out'}"]
    rows = [{"instruction": f"w{i} w3", "input": "w4", "output": "w5 w6"} for i in range(40)]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides += [f"recover.data.path={tmp_path / 'instructions.jsonl'}", "recover.data.held_out=0.2"]
    overrides += ["recover.data.sequence_length=32", "recover.max_steps=1", "recover.per_device_train_batch_size=2"]
    assert main(["prune", f"llama-7b-{pruned}.yaml", *overrides, "recover.repair.examples=4"]) == 0
    report = json.loads((tmp_path / "out" / "dms_report.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out") is not None
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cut.dtype == torch.bfloat16
    assert sum(p.numel() for n, p in cut.named_parameters() if ".layers." in n) <= (1 - pruned / 100) * layers
    assert report["model_class"] == "DmsLlamaForCausalLM"
    assert {"repaired", "recovered"} <= set(report)


@pytest.mark.slow
def test_the_recipe_for_imagenet_runs_at_its_size_on_a_few_images(tmp_path):
    generator = np.random.default_rng(0)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(6):
            Picture.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
                tmp_path / place / f"{i}.png"
            )
    overrides = [f"data.path={tmp_path / 'train'}", f"data.held_out={tmp_path / 'val'}", "eval.batch_size=4"]
    overrides += ["train.max_steps=3", "train.per_device_train_batch_size=2", "train.dataloader_num_workers=0"]
    overrides += ["train.save_strategy=no", "dms.warmup_steps=1", "recover.max_steps=30"]
    assert main(["prune", "deit-tiny-np.yaml", *overrides, f"output.path={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "dms_report.json").read_text())
    original, found = report["original"]["macs_per_token"], report["pruned"]["macs_per_token"]
    assert original * 197 == pytest.approx(1.25e9, rel=0.01)
    assert 0.99 < found / original <= 1
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.image_size == 224


# ---- adapters and packed weights ----
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
LORA = "lora={r: 2, lora_dropout: 0.1}"


@peft_warns
def test_a_search_and_a_training_after_the_cut_with_adapters_end_in_a_plain_model(recipe, dense):
    options = ["recover={repair: {examples: 2}, lora: {r: 2}, max_steps: 3, distillation: {}}", "dms.layout=per_layer"]
    code, output = recipe(LORA, *options)
    assert code == 0
    report = json.loads((output / "dms_report.json").read_text())
    assert {"pruned", "repaired", "recovered"} <= set(report)
    assert report["recovered"]["perplexity"] != report["repaired"]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert not any("lora" in name for name in model.state_dict())
    frozen = AutoModelForCausalLM.from_pretrained(dense)
    kept = load_plan(output / "dms_plan.json", bind(LLAMA, frozen))[0].kept
    embedding = frozen.model.embed_tokens.weight.index_select(1, kept["hidden"][0])
    assert torch.equal(model.model.embed_tokens.weight, embedding)  # all-linear does not adapt embeddings


def test_a_model_is_trained_after_the_cut_on_other_data_by_a_template(recipe, tmp_path):
    rows = [{"question": f"w{i % 9}", "answer": f"w{i % 7} w1"} for i in range(60)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "template: '{question} w2 {answer}'"
    data = f"recover.data={{path: {tmp_path}/answers.jsonl, {template}, sequence_length: 12, held_out: 0.2}}"
    code, output = recipe(data, "recover.max_steps=3", "recover.learning_rate=0.01")
    assert code == 0
    other = json.loads((output / "dms_report.json").read_text())["recovered"]
    code, output = recipe("recover.max_steps=3", "recover.learning_rate=0.01", "output.overwrite=true")
    assert code == 0
    assert json.loads((output / "dms_report.json").read_text())["recovered"]["perplexity"] != other["perplexity"]


@peft_warns
def test_a_search_on_packed_weights_cuts_the_whole_ones(recipe, dense):
    pytest.importorskip("bitsandbytes")
    for options in (["dms.pipeline=p-"], [LORA]):
        code, output = recipe("model.quantization=4bit", "output.overwrite=true", "dms.layout=per_layer", *options)
        assert code == 0
        model, frozen = AutoModelForCausalLM.from_pretrained(output), AutoModelForCausalLM.from_pretrained(dense)
        kept = load_plan(output / "dms_plan.json", bind(LLAMA, frozen))[0].kept
        weight = frozen.model.layers[kept["layers"][0][0]].self_attn.q_proj.weight
        found = model.model.layers[0].self_attn.q_proj.weight
        same = torch.isin(found, weight).all()  # the weights at model.path themselves, not rounded ones
        assert same == (options != [LORA])


@peft_warns
@pytest.mark.parametrize("model", ["bert", "vit"])
def test_a_classifier_is_searched_with_adapters(classifiers, model):
    code, _ = classifiers(model, LORA, "recover.lora={r: 2}")
    assert code == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lora={}", "dms.pipeline=p-"],
            "lora trains beside pretrained weights that are frozen, and dms.pipeline is p-",
        ),
        (["lora={rank: 2}"], "Unknown key lora.rank."),
        (["lora=3"], "lora must be a section with keys, or {} for its defaults; got 3"),
        (["recover={lora: {r: -1}, max_steps: 2}"], "recover.lora: `r` should be a positive integer"),
        (["recover={lora: {}, max_steps: 2}", "dms.layout=padded"], "adapters would fill the zeros"),
        (
            ["data.template='{tekst}'"],
            "data.template: '{tekst}' cannot be filled (KeyError: 'tekst'). The data has columns",
        ),
        (
            ["recover={data: {path: nothing.jsonl}, max_steps: 1}"],
            "recover.data.path: there is no file 'nothing.jsonl'",
        ),
        (
            ["recover={data: {path: TMP/text.jsonl, text_column: tekst}, max_steps: 1}"],
            "recover.data.text_column: the data has no column 'tekst'. It has text.",
        ),
        (["data.template='{text.x}'"], "data.template: '{text.x}' cannot be filled (AttributeError"),
        (["model.quantization=2bit"], "model.quantization must be 8bit or 4bit, or be left out; got '2bit'"),
        (["model.quantization=4bit"], "weights in 4bit cannot train, which dms.pipeline p asks for"),
        (["model.quantization=4bit", "dms.pipeline=p-", "finetune.max_steps=1"], "leave one out"),
    ],
)
def test_adapters_and_packed_weights_that_cannot_be_had_are_refused(recipe, tmp_path, capsys, overrides, message):
    code, output = recipe(*(override.replace("TMP", str(tmp_path)) for override in overrides))
    assert code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_data_of_a_training_after_the_cut_has_the_labels_of_the_model(classifiers, tmp_path, capsys):
    rows = [{"text": f"w{i}", "label": ["no", "maybe"][i % 2]} for i in range(20)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output = classifiers("bert", f"recover.data={{path: {tmp_path}/others.jsonl, held_out: 0.25}}")
    assert code == 2
    assert "recover.data.label_column: the labels are maybe, no; the model has" in capsys.readouterr().err
    assert not output.exists()
