"""A per-layer folder works like any other: tests of what users do with a model of transformers.

Loading by hf_dms, by trust_remote_code and under other heads, saving again, attention implementations and caches:
test_modeling_dms.py and test_encoders.py. Adapters: test_per_layer_adapters.py.
"""

import copy
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import fresh
from helpers.laws import SHIPPED
from helpers.per_layer import FAMILIES, make_case, same_weights
from helpers.tiny import relative_difference

from hf_dms.cut.verify import TOLERANCE, outputs_of


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return make_case(request.param, tmp_path_factory.mktemp(request.param) / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_case("llama", tmp_path_factory.mktemp("llama") / "out")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def gradients(model, case):
    """The loss of a batch and every gradient, by name."""
    loss = model(**case.inputs, labels=case.labels).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- loading ----
def test_auto_classes_read_the_config_and_build_from_it(case):
    config = transformers.AutoConfig.from_pretrained(case.folder)
    assert type(config) is type(case.model.config)
    assert config.to_json_string() == case.model.config.to_json_string()
    fresh = case.family.auto.from_config(config)
    assert type(fresh) is type(case.model)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in case.model.named_parameters()}


def test_its_tokenizer_or_image_processor_is_the_one_saved_with_it(case):
    try:
        processor = case.family.auto_processor.from_pretrained(case.folder)
    except ImportError as error:  # transformers 5.17 needs torchvision for images
        pytest.skip(str(error))
    assert type(processor) is type(case.processor)
    found, expected = case.encode(processor), case.encode(case.processor)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_in_many_files_loads_to_the_same_model(case, tmp_path):
    case.model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_weights(case.family.auto.from_pretrained(tmp_path), case.model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_loads_in_the_dtype_asked_for_and_auto_is_the_saved_one(case, dtype, tmp_path):
    model = case.load(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative_difference(case.run(model), case.logits) < TOLERANCE[dtype]
    model.save_pretrained(tmp_path)
    again = case.family.auto.from_pretrained(tmp_path, dtype="auto")
    assert same_weights(again, model)
    assert case.load(dtype="auto").dtype == torch.float32


def test_a_classifier_loads_with_another_number_of_labels(case):
    if case.family.task == "text-generation":
        pytest.skip("has no labels")
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    model = case.load(**options)
    assert outputs_of(model, case.inputs).shape == (2, 5)
    found, expected = (each.base_model(**case.inputs)[0] for each in (model, case.model))
    assert relative_difference(found, expected) < SHIPPED


def test_the_same_seed_gives_the_same_fresh_weights(case):
    def fresh():
        torch.manual_seed(0)
        return case.family.auto.from_config(case.model.config)

    assert same_weights(fresh(), fresh())


# ---- where it is ----
def test_layers_are_not_split_over_devices(case):
    kinds = {type(layer).__name__ for layer in case.layers(case.model)}
    assert len(kinds) == 1
    assert kinds <= set(case.model._no_split_modules)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_gives_the_same_model(case, device_map):
    model = case.load(device_map=device_map, max_memory={"cpu": "1GB"})
    assert relative_difference(outputs_of(model, case.inputs), case.logits) < SHIPPED


def test_layers_offloaded_to_disk_compute_the_same(case, tmp_path):
    room = int(0.85 * case.model.get_memory_footprint())
    model = case.load(device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path)
    layers = {device for name, device in model.hf_device_map.items() if re.search(r"\.\d+$", name)}
    assert layers == {"cpu", "disk"}
    assert relative_difference(outputs_of(model, case.inputs), case.logits) < SHIPPED


# ---- pipelines ----
def test_a_pipeline_on_the_folder_gives_what_the_model_does(case):
    pipeline = transformers.pipeline(case.family.task, model=str(case.folder), device="cpu")
    answers = pipeline(case.example, **case.family.options)
    inputs = case.encode(case.processor)
    if case.family.task == "text-generation":
        tokens = case.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert answers == [{"generated_token_ids": tokens[0].tolist()}]
        return
    scores = outputs_of(case.model, inputs).softmax(-1)[0].tolist()
    found = {answer["label"]: answer["score"] for answer in answers}
    assert found == pytest.approx({f"LABEL_{label}": score for label, score in enumerate(scores)}, rel=SHIPPED)


WITHOUT_HF_DMS = """
import json, sys
sys.modules["hf_dms"] = None  # as if it were not installed
import torch, transformers
torch.set_num_threads(1)
for task, folder, example, options in json.loads(sys.argv[1]):
    pipeline = transformers.pipeline(task, model=folder, trust_remote_code=True, device="cpu")
    print(json.dumps([type(pipeline.model).__module__.split(".")[0], pipeline(example, **options)]))
    pipeline.model.save_pretrained(folder + ".again")
"""


def test_pipelines_with_trust_remote_code_answer_and_save_the_same_without_hf_dms(tmp_path):
    cases = [make_case(name, tmp_path / name) for name in FAMILIES]
    jobs = [(c.family.task, str(c.folder), c.example, c.family.options) for c in cases]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = fresh.run(["-c", WITHOUT_HF_DMS, json.dumps(jobs)], tmp_path, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    for line, (task, folder, example, options) in zip(result.stdout.splitlines(), jobs, strict=True):
        module, answers = json.loads(line)
        assert module == "transformers_modules"
        assert answers == transformers.pipeline(task, model=folder, device="cpu")(example, **options)
        written, first = contents(f"{folder}.again"), contents(folder)
        assert {"config.json", "model.safetensors", "modeling_dms.py"} <= set(written)
        assert all(content == first[name] for name, content in written.items())


# ---- use ----
def test_copies_and_pickles_compute_the_same_and_share_no_tensor(case):
    owned = {parameter.data_ptr() for parameter in case.model.parameters()}
    for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert same_weights(other, case.model)
        assert other.config == case.model.config
        assert relative_difference(outputs_of(other, case.inputs), case.logits) < SHIPPED
        assert not owned & {parameter.data_ptr() for parameter in other.parameters()}


@pytest.mark.parametrize("way", ["left padding", "beams", "static beams", "lookup", "assistant", "embeddings"])
def test_every_way_of_decoding_gives_the_tokens_of_the_plain_one(llama, way):
    model = llama.model
    one, options = {name: tensor[:1] for name, tensor in llama.inputs.items()}, dict(max_new_tokens=8, do_sample=False)
    padded = {name: torch.nn.functional.pad(tensor, (3, 0)) for name, tensor in one.items()}
    embedded = {"inputs_embeds": model.get_input_embeddings()(one["input_ids"])}
    arguments, plain = {
        "left padding": (padded, {}),
        "beams": (one | {"num_beams": 3}, {"num_beams": 3, "use_cache": False}),
        "static beams": (one | {"num_beams": 3, "cache_implementation": "static"}, {"num_beams": 3}),
        "lookup": (one | {"prompt_lookup_num_tokens": 2}, {}),
        "assistant": (one | {"assistant_model": copy.deepcopy(model)}, {}),
        "embeddings": (one | embedded, {}),
    }[way]
    found = model.generate(**arguments, **options)
    assert torch.equal(found[:, -8:], model.generate(**one, **options, **plain)[:, -8:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # 5.17 knows no other
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(case):
    model = case.load().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, expected = gradients(model, case)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in case.layers(model))
    found_loss, found = gradients(model, case)
    assert torch.equal(found_loss, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compiled_model_is_one_graph_and_computes_the_same(case):
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    assert relative_difference(outputs_of(compiled, case.inputs), case.logits) < SHIPPED
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")  # transformers 5.23 asks
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # imported by 5.17
def test_an_exported_model_computes_the_same(case):
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    exported = DynamoExporter().export(case.model, dict(case.inputs), config=DynamoConfig())
    if isinstance(exported, torch.export.ExportedProgram):  # transformers < 5.23
        exported = exported.module()
    assert relative_difference(exported(**case.inputs).logits, case.logits) < SHIPPED


def test_added_tokens_change_nothing_for_the_others(case, tmp_path):
    if case.family.task == "image-classification":
        pytest.skip("has no tokens")
    model, vocabulary = case.load(), case.model.config.vocab_size
    model.resize_token_embeddings(vocabulary + 7)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == vocabulary + 7
    logits = outputs_of(model, case.inputs)
    assert relative_difference(logits[..., : case.logits.shape[-1]], case.logits) < SHIPPED
    model.save_pretrained(tmp_path)
    assert same_weights(case.family.auto.from_pretrained(tmp_path), model)
