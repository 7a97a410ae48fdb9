"""Per-layer checkpoints load with and without hf_dms, and are used as any other model.

Each way of loading runs once, over all folders, in a process of its own. The parent saves models and their outputs.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import fresh
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from hf_dms import DMSConfig, attach_, prune
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.verify import outputs_of

ROOT = Path(__file__).parents[2]
AUTO = {
    LlamaModel: "AutoModel",
    LlamaForCausalLM: "AutoModelForCausalLM",
    LlamaForSequenceClassification: "AutoModelForSequenceClassification",
    LlamaForTokenClassification: "AutoModelForTokenClassification",
    LlamaForQuestionAnswering: "AutoModelForQuestionAnswering",
}
WIDTHS = ("kv", "mlp", "hidden")
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mha": {"num_key_value_heads": 6},
    "shallower": {"num_hidden_layers": 5, "dims": None, "protect": {"min": {"layers": 3}}},
}


def per_layer(cls=LlamaForCausalLM, layout="per_layer", seed=0, dims=WIDTHS, protect=None, **overrides):
    model = tiny_llama(cls, **overrides)
    attach_(model, DMSConfig(target=0.7, layout=layout, prune=dims, protect=protect or {}))
    search_(model, seed)
    return prune(model, inputs=token_batch())


def save(pruned, auto, folder):
    """Save a model to a folder, and its outputs beside it."""
    save_pruned(pruned, folder, inputs=token_batch())
    expected = {"outputs": outputs_of(pruned, token_batch())}
    if pruned.can_generate():
        expected["generated"] = pruned.generate(**token_batch(), max_new_tokens=8, do_sample=False)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, f"{folder}.expected")
    return {"folder": str(folder), "auto": auto, "model_type": pruned.config.model_type}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Per-layer folders of every head and variant."""
    root = tmp_path_factory.mktemp("per_layer")
    saved = [save(per_layer(cls), auto, root / cls.__name__) for cls, auto in AUTO.items()]
    saved += [save(per_layer(**VARIANTS[name]), "AutoModelForCausalLM", root / name) for name in VARIANTS]
    assert {each["model_type"] for each in saved} == {"dms_llama"}
    return saved


@pytest.fixture(scope="module")
def stock_folders(tmp_path_factory):
    """Stock folders: Llamas of every head, uniform and padded, and a Mistral."""
    root = tmp_path_factory.mktemp("stock")
    saved = [save(per_layer(cls, "uniform"), auto, root / cls.__name__) for cls, auto in AUTO.items()]
    padded = {"layout": "padded", "dims": ("kv", "mlp"), "attention_bias": True, "mlp_bias": True}
    saved += [save(per_layer(cls, **padded), auto, root / f"padded {cls.__name__}") for cls, auto in AUTO.items()]
    model = tiny_llama(num_key_value_heads=6)
    attach_(model, DMSConfig(target=0.95, prune=("kv",), protect={"max": {"kv": 5}, "min": {"kv": 5}}))
    search_(model)
    mistral = save(prune(model, inputs=token_batch()), "AutoModelForCausalLM", root / "mistral")
    assert mistral["model_type"] == "mistral"
    assert {each["model_type"] for each in saved} == {"llama"}
    return [*saved, mistral]


LOAD = """
import json, sys
jobs, preamble = json.loads(sys.argv[1]), sys.argv[2]
exec(preamble)
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[3]))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
for job in jobs:
    model = getattr(transformers, job["auto"]).from_pretrained(job["folder"], **job.get("options", {})).eval()
    assert model.config.model_type == job["model_type"], model.config.model_type
    expected = load_file(job["folder"] + ".expected")
    with torch.no_grad():
        output = model(**batch)
    found = output["logits"] if "logits" in output else output[0]
    difference = (found - expected["outputs"]).abs().max() / expected["outputs"].abs().max()
    assert difference < 1e-5, (job, difference)
    if "generated" in expected:
        generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
        assert torch.equal(generated, expected["generated"]), job
    print(type(model).__module__, type(model).__name__)
assert ("hf_dms" in sys.modules and sys.modules["hf_dms"] is not None) == ("import hf_dms" in preamble)
"""
WITH_HF_DMS = "import hf_dms"
WITHOUT_HF_DMS = """
sys.modules["hf_dms"] = None  # as if it were not installed
try:
    import hf_dms
except ImportError:
    pass
else:
    raise AssertionError("hf_dms is there")
""".replace("import hf_dms", "__import__('hf_dms')")


def load_in_a_process_of_its_own(jobs, preamble, tmp_path):
    about = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ids = json.dumps(token_batch()["input_ids"].tolist())
    result = fresh.run(["-c", LOAD, json.dumps(jobs), preamble, ids], tmp_path, os.environ | about)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split("\n")[: len(jobs)]


# ---- loading ----
def test_per_layer_folders_load_after_import_hf_dms(folders, tmp_path):
    classes = load_in_a_process_of_its_own(folders, WITH_HF_DMS, tmp_path)
    assert classes[:2] == ["hf_dms.cut.modeling_dms DmsLlamaModel", "hf_dms.cut.modeling_dms DmsLlamaForCausalLM"]


@pytest.fixture(scope="module")
def without_hf_dms(folders, stock_folders, tmp_path_factory):
    """Classes of the per-layer and of the stock folders, as a process without hf_dms loads them."""
    trusted = [each | {"options": {"trust_remote_code": True}} for each in folders]
    classes = load_in_a_process_of_its_own([*stock_folders, *trusted], WITHOUT_HF_DMS, tmp_path_factory.mktemp("home"))
    return classes[len(stock_folders) :], classes[: len(stock_folders)]


def test_per_layer_folders_load_with_trust_remote_code_without_hf_dms(without_hf_dms):
    classes, _ = without_hf_dms
    assert all(line.startswith("transformers_modules.") for line in classes)
    assert [line.rpartition(" ")[2] for line in classes[:2]] == ["DmsLlamaModel", "DmsLlamaForCausalLM"]


def test_stock_folders_load_without_hf_dms(without_hf_dms):
    _, classes = without_hf_dms
    assert all(line.startswith("transformers.models.") for line in classes)
    assert classes[-1].endswith(" MistralForCausalLM")


def test_a_base_model_folder_loads_under_a_head_and_the_other_way_round(folders):
    folder = next(each["folder"] for each in folders if each["auto"] == "AutoModelForCausalLM")
    base, whole = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert relative_difference(outputs_of(base, token_batch()), whole.model(**token_batch()).last_hidden_state) < 1e-5


# ---- the folder ----
def test_the_config_names_each_layers_sizes_and_a_class_for_every_head(folders):
    folder = Path(folders[1]["folder"])
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    overrides = {int(index): values for index, values in config["per_layer_config"].items()}
    found = [overrides.get(i, {}).get("intermediate_size", config["intermediate_size"]) for i in range(len(widths))]
    assert found == widths
    assert len(set(widths)) > 1
    assert config["num_hidden_layers"] == len(widths)
    assert {"AutoConfig", *AUTO.values()} == set(config["auto_map"])
    assert all(value.startswith("modeling_dms.DmsLlama") for value in config["auto_map"].values())
    assert (folder / "modeling_dms.py").read_text() == (ROOT / "hf_dms" / "cut" / "modeling_dms.py").read_text()
    assert "skip" not in json.dumps(config["per_layer_config"])


def test_saving_again_gives_the_same_model(folders, tmp_path):
    for each in folders[1:3]:
        auto = getattr(sys.modules["transformers"], each["auto"])
        first = auto.from_pretrained(each["folder"])
        first.save_pretrained(tmp_path / each["auto"])
        second = auto.from_pretrained(tmp_path / each["auto"])
        config = (tmp_path / each["auto"] / "config.json").read_text()
        assert config == (Path(each["folder"]) / "config.json").read_text()
        expected = first.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_dict().items())
        assert relative_difference(outputs_of(second, token_batch()), outputs_of(first, token_batch())) < 1e-5
        assert (tmp_path / each["auto"] / "modeling_dms.py").is_file()


def test_configs_are_equal_by_value(folders):
    first, second = (AutoConfig.from_pretrained(folders[1]["folder"]) for _ in range(2))
    assert first == second
    assert first is not second
    second.rms_norm_eps = 0.5
    assert first != second
    assert first != tiny_llama().config


# ---- use ----
def test_the_attention_implementation_reaches_every_layer():
    model = per_layer()
    logits = model(**token_batch()).logits
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    output = model(**token_batch(), output_attentions=True)
    assert relative_difference(output.logits, logits) < 1e-5
    groups = [layer.self_attn.k_proj.out_features // 4 for layer in model.model.layers]
    assert [attention.shape[1] for attention in output.attentions] == [2 * group for group in groups]
    assert len(set(groups)) > 1


def test_generate_with_a_static_cache_equals_that_with_a_dynamic_one():
    model = per_layer()
    options = dict(max_new_tokens=10, do_sample=False)
    dynamic = model.generate(**token_batch(), **options)
    assert torch.equal(model.generate(**token_batch(), **options, cache_implementation="static"), dynamic)
    assert torch.equal(model.generate(**token_batch(), **options, use_cache=False), dynamic)
    assert dynamic.shape == (2, 17)


def test_gradients_reach_every_parameter():
    model = per_layer().train()
    model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_a_model_built_from_its_config_has_its_sizes_and_fresh_weights():
    model = per_layer(attention_bias=True)
    fresh = type(model)._from_config(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for name, parameter in fresh.named_parameters():
        expected = 1.0 if "norm" in name else 0.0
        assert abs(float(parameter.detach().mean()) - expected) < 0.05, name  # false for NaN
    linear = fresh.model.layers[0].mlp.up_proj
    assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_lora_attaches_and_merges():
    peft = pytest.importorskip("peft")
    model = per_layer()
    logits = model(**token_batch()).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    adapted = tuned(**token_batch()).logits
    assert relative_difference(adapted, logits) > 1e-3
    assert relative_difference(tuned.merge_and_unload()(**token_batch()).logits, adapted) < 1e-5


def test_an_unknown_name_is_an_attribute_error():
    from hf_dms.cut import modeling_dms

    with pytest.raises(AttributeError, match="has no attribute 'DmsNothing'"):
        _ = modeling_dms.DmsNothing
    with pytest.raises(AttributeError, match="has no attribute 'LlamaModel'"):
        _ = modeling_dms.LlamaModel
    assert modeling_dms.DmsLlamaModel is modeling_dms.dms_model_class(LlamaModel)
