"""A cut from files equals the cut in memory, whatever the files look like, and is checked tensor by tensor."""

import itertools
import json
import weakref

import huggingface_hub
import pytest
import torch
import transformers
from helpers.laws import tiny
from helpers.marks import ordinary_if
from helpers.schema import mistakes
from helpers.tiny import search_, tiny_llama, token_batch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.core_model_loading import Concatenate, WeightConverter

import hf_dms.checkpoint.stored
import hf_dms.checkpoint.stream
from hf_dms import DMSConfig, attach_
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cli import main
from hf_dms.cut.plan import PLAN_FILE, Plan, load_plan, plan_to_json
from hf_dms.cut.prune import plan_of, prune
from hf_dms.cut.slicing import cut, cut_tensor
from hf_dms.cut.verify import outputs_of
from hf_dms.errors import VerificationError
from hf_dms.experiment.cut_files import cut_by_plan
from hf_dms.experiment.recipe import cut_options
from hf_dms.experiment.sections import ModelConfig, OutputConfig
from hf_dms.gating.attach import detach_, gates_of


def searched_plan(model, layout, **options):
    """A plan as a search would leave it, and the architecture that it is for."""
    attach_(model, DMSConfig(**({"target": 0.7, "layout": layout, "sequence_length": 7} | options)))
    search_(model)
    plan, bound = plan_of(model), gates_of(model).attachment.bound
    detach_(model)
    return plan, bound


@pytest.fixture
def made(tmp_path):
    """A function that saves a dense model and a plan, and returns the model that the plan cuts from it in memory."""

    def make(model, layout="per_layer", max_shard_size="5GB", **options):
        plan, bound = searched_plan(model, layout, **options)
        model.save_pretrained(tmp_path / "dense", max_shard_size=max_shard_size)
        (tmp_path / PLAN_FILE).write_text(plan_to_json(plan, bound, layout))
        return cut(model, bound, plan, layout)

    return make


def stream(tmp_path, **options):
    return cut_by_plan(
        str(tmp_path), ModelConfig(str(tmp_path / "dense")), OutputConfig(str(tmp_path / "out"), **options)
    )


def contents(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_equal_files(found, expected):
    """Assert that two models have the same names, and values that are equal bit by bit."""
    found, expected = contents(found), contents(expected)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)


CASES = {
    "llama": lambda: tiny_llama(),
    "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama-base": lambda: tiny(transformers.LlamaModel),
    "llama-bf16": lambda: tiny_llama(dtype=torch.bfloat16),
    "llama-classifier": lambda: tiny(transformers.LlamaForSequenceClassification),
    "gemma2": lambda: tiny(transformers.Gemma2ForCausalLM),
    "bert": lambda: tiny(transformers.BertForMaskedLM),
    "distilbert": lambda: tiny(transformers.DistilBertForSequenceClassification),
    "vit": lambda: tiny(transformers.ViTForImageClassification),
    "dinov2": lambda: tiny(transformers.Dinov2Model),
    "beit": lambda: tiny(transformers.BeitForImageClassification),
    "convnextv2": lambda: tiny(transformers.ConvNextV2ForImageClassification),
    "resnet": lambda: tiny(transformers.ResNetForImageClassification),
    "mobilenet_v2": lambda: tiny(transformers.MobileNetV2ForImageClassification),
    "efficientnet": lambda: tiny(transformers.EfficientNetForImageClassification),
    "regnet": lambda: tiny(transformers.RegNetForImageClassification),
    "swin": lambda: tiny(transformers.SwinForImageClassification),
    "mobilevit": lambda: tiny(transformers.MobileViTForImageClassification),
}
NO_STOCK_LAYOUT = ("mobilenet_v2", "efficientnet", "swin", "mobilevit")  # their stock configs do not hold all widths


@pytest.mark.parametrize("name", ["llama", "llama-bf16", "bert", "resnet"])
def test_scales_travel_with_the_plan(name, tmp_path):
    """The scales are equal bit by bit: the plan's file holds what the search learned, not only which units stay."""
    model = CASES[name]()
    attach_(model, DMSConfig(target=0.9, layout="per_layer", pipeline="p-", scales="norms"))
    search_(model)
    gates = gates_of(model)
    generator = torch.Generator().manual_seed(0)
    for scales in gates.scales.values():
        scales.normal_(0, 0.5, generator=generator)
    plan, bound, pruned = plan_of(model), gates.attachment.bound, prune(model)
    detach_(model)
    assert plan.log_scales
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / PLAN_FILE).write_text(plan_to_json(plan, bound, "per_layer"))
    stream(tmp_path)
    save_pruned(pruned, tmp_path / "expected")
    assert_equal_files(tmp_path / "out", tmp_path / "expected")
    plain = cut(model, bound, Plan(plan.kept), "per_layer")
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), pruned.parameters(), strict=True))
    assert json.loads((tmp_path / "out" / PLAN_FILE).read_text()) == json.loads((tmp_path / PLAN_FILE).read_text())


@pytest.mark.parametrize(
    ("name", "layout"),
    ordinary_if(
        lambda name, layout: layout == "per_layer" or name in ("llama", "bert", "vit", "resnet"),
        [
            (name, layout)
            for name, layout in itertools.product(CASES, ["uniform", "per_layer", "padded"])
            if layout == "per_layer" or name not in NO_STOCK_LAYOUT
        ],
    ),
)
def test_streamed_equals_cut_in_memory(name, layout, made, tmp_path):
    options = {"prune": ["mlp", "layers"]} if name in ("bert", "distilbert") and layout != "per_layer" else {}
    inner = {"convnextv2": [], "resnet": ["mid", "reduced"], "regnet": ["groups", "squeeze"]}
    if layout == "padded" and name in inner:
        options = {"prune": [*inner[name], "layers"], "target": 0.9}
    pruned = made(CASES[name](), layout, **options)
    report = stream(tmp_path)
    save_pruned(pruned, tmp_path / "expected")
    assert_equal_files(tmp_path / "out", tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_text() == file.read_text(), file.name
    assert report["model_class"] == type(pruned).__name__
    assert report["pruned"]["num_params"] == sum(parameter.numel() for parameter in pruned.parameters())


# ---- what files can look like ----
def test_a_sharded_checkpoint_stays_one_and_loses_the_shards_of_dropped_layers(made, tmp_path):
    model = tiny_llama(num_hidden_layers=5)
    pruned = made(model, max_shard_size="3KB", prune=["layers", "mlp"], target=0.6)
    dense_shards = list((tmp_path / "dense").glob("*.safetensors"))
    assert pruned.config.num_hidden_layers < 5
    stream(tmp_path)
    save_pruned(pruned, tmp_path / "expected")
    assert_equal_files(tmp_path / "out", tmp_path / "expected")
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert 1 < len(shards) < len(dense_shards)
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name: file for file in shards for name in load_file(tmp_path / "out" / file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in contents(tmp_path / "out").values())
    loaded, info = type(pruned).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs_of(loaded, token_batch()), outputs_of(pruned, token_batch()))


def test_names_that_transformers_renames_or_leaves_out_are_renamed_and_left_out(made, tmp_path):
    pruned = made(tiny(transformers.BertForMaskedLM))
    file = tmp_path / "dense" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(file).items():
        ending = ".".join(name.split(".")[-2:])
        tensors[name.replace(ending, old.get(ending, ending))] = tensor
    save_file(tensors | {"cls.seq_relationship.bias": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert stream(tmp_path)["left_out"] == ["cls.seq_relationship.bias"]
    save_pruned(pruned, tmp_path / "expected")
    assert_equal_files(tmp_path / "out", tmp_path / "expected")


def test_tied_weights_that_a_file_holds_twice_are_counted_once(made, tmp_path):
    pruned = made(tiny_llama(tie_word_embeddings=True))
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    report = stream(tmp_path)
    assert report["pruned"]["num_params"] == sum(parameter.numel() for parameter in pruned.parameters())
    loaded = type(pruned).from_pretrained(tmp_path / "out")
    assert torch.equal(outputs_of(loaded, token_batch()), outputs_of(pruned, token_batch()))


def test_values_that_are_not_numbers_are_copied_too(made, tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[:] = float("nan")
    made(model)
    stream(tmp_path)
    assert contents(tmp_path / "out")["model.norm.weight"].isnan().all()


def test_padding_is_counted_apart(made, tmp_path):
    made(tiny_llama(), "padded")
    report = stream(tmp_path)
    model = tiny_llama()
    bound = bind(spec_for(model.config), model)
    kept = cut(model, bound, load_plan(tmp_path, bound)[0], "per_layer")
    assert report["pruned"]["kept_num_params"] == sum(parameter.numel() for parameter in kept.parameters())
    assert report["pruned"]["kept_num_params"] < report["pruned"]["num_params"]


def test_what_else_is_in_the_folder(made, tmp_path):
    model = tiny_llama()
    model.generation_config.max_new_tokens = 5
    pruned = made(model)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "training_args.bin").write_text("")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\n---\n")
    report = stream(tmp_path)
    out = tmp_path / "out"
    assert type(pruned).from_pretrained(out).generation_config.max_new_tokens == 5
    assert transformers.AutoTokenizer.from_pretrained(out)("b")["input_ids"] == [1]
    assert (out / PLAN_FILE).read_text() == (tmp_path / PLAN_FILE).read_text()
    assert json.loads((out / "dms_report.json").read_text()) == report
    assert mistakes(report) == []
    assert report["model"]["path"] == ".../dense"
    assert f"{report['pruned']['num_params']:,}" in (out / "report.html").read_text()
    assert report["proof"] == "tensors"
    assert len(report["sizes"]["mlp"]) == 3
    assert "DmsLlamaForCausalLM" not in (card := (out / "README.md").read_text())
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in card
    assert "license: mit" in card
    assert not (out / "training_args.bin").exists()


def test_a_model_of_the_hub_is_found(made, tmp_path, monkeypatch):
    made(tiny_llama())
    snapshot = tmp_path / "hub" / "models--user--dense" / "snapshots" / "0a"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "dense").rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    report = cut_by_plan(str(tmp_path), ModelConfig("user/dense"), OutputConfig(str(tmp_path / "out")))
    assert report["model"] == {"path": "user/dense", "revision": None}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"model.path: no model can be read from 'user/other'"):
        cut_by_plan(str(tmp_path), ModelConfig("user/other"), OutputConfig(str(tmp_path / "other")))


def test_no_more_than_a_shard_is_held(made, tmp_path, monkeypatch):
    made(tiny_llama(), max_shard_size="3KB")
    tensors, held = [], []

    def counted(*args):
        tensors.append(weakref.ref(result := cut_tensor(*args)))
        held.append(sum(tensor().nbytes for tensor in tensors if tensor() is not None))
        return result

    monkeypatch.setattr(hf_dms.checkpoint.stream, "cut_tensor", counted)
    stream(tmp_path)
    shards = [sum(t.nbytes for t in load_file(file).values()) for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(shards) > 5
    assert max(held) == max(shards)


# ---- what is wrong is said, and nothing is left behind ----
def rewrite(change):
    """A function that changes the config of a dense folder."""

    def apply(dense):
        config = json.loads((dense / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps(config | change))

    return apply


def retensor(change):
    """A function that changes the tensors of a dense folder."""

    def apply(dense):
        tensors = load_file(dense / "model.safetensors")
        change(tensors)
        save_file(tensors, dense / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda dense: (dense / "config.json").unlink(), "No model can be read from"),
        (rewrite({"architectures": None}), "architectures is None, expected the name of a model class"),
        (rewrite({"architectures": ["TheirLlama"]}), r"architectures is \['TheirLlama'\], expected"),
        (rewrite({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "is quantised: packed weights"),
        (rewrite({"intermediate_size": 24}), "It belongs to another model"),
        (
            rewrite({"vocab_size": 34}),
            r"has shape \(33, 24\) in model.safetensors, expected \(34, 24\). Is config.json",
        ),
        (rewrite({"model_type": "gpt2"}), "model type 'gpt2' is not supported"),
        (retensor(lambda tensors: tensors.pop("model.norm.weight")), "there are no weights for 'model.norm.weight'"),
        (lambda dense: (dense / "model.safetensors").rename(dense / "x.bin"), "only .bin files, which cannot be read"),
        (
            lambda dense: (dense / "model.safetensors").unlink(),
            "has no model.safetensors and no model.safetensors.index",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_cut_is_refused(made, tmp_path, spoil, message):
    made(tiny_llama())
    spoil(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"dense", PLAN_FILE}


def test_a_shard_that_is_not_there_is_named(made, tmp_path):
    made(tiny_llama(), max_shard_size="5KB")
    next((tmp_path / "dense").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-\d+.safetensors, which model.safetensors.index.json"):
        stream(tmp_path)


def test_tensors_that_transformers_puts_together_are_refused(made, tmp_path, monkeypatch):
    made(tiny_llama())
    together = WeightConverter("gate_proj.weight", "gate_up_proj.weight", operations=[Concatenate(0)])
    monkeypatch.setattr(hf_dms.checkpoint.stored, "get_model_conversion_mapping", lambda model: [together])
    with pytest.raises(ValueError, match=r"gate_proj.weight', which transformers merges or splits .* use hf_dms.prune"):
        stream(tmp_path)


def failing_save(tensors, file, metadata):
    if file.name.startswith("1."):
        raise OSError("no space left")
    save_file(tensors, file, metadata)


def wrong_save(tensors, file, metadata):
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, file, metadata)


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_half_written_is_left_by_an_error_in_the_middle(made, tmp_path, monkeypatch, overwrite):
    made(tiny_llama(), max_shard_size="5KB")
    if overwrite:
        stream(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    monkeypatch.setattr(hf_dms.checkpoint.stream, "save_file", failing_save)
    with pytest.raises(OSError, match="no space left"):
        stream(tmp_path, overwrite=overwrite)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_what_is_not_the_slice_is_not_saved(made, tmp_path, monkeypatch):
    made(tiny_llama())
    monkeypatch.setattr(hf_dms.checkpoint.stream, "save_file", wrong_save)
    with pytest.raises(VerificationError, match="what is read back is not the slice of"):
        stream(tmp_path)
    assert not (tmp_path / "out").exists()


def test_names_that_the_class_would_not_load_are_not_saved(made, tmp_path, monkeypatch):
    made(tiny_llama())
    monkeypatch.setattr(
        hf_dms.checkpoint.stream, "revert_weight_conversion", lambda model, tensors: {f"x.{n}": 0 for n in tensors}
    )
    with pytest.raises(VerificationError, match=r"'x\..*' has no parameter"):
        stream(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_existing_result_stays_unless_it_may_be_replaced(made, tmp_path):
    made(tiny_llama())
    stream(tmp_path)
    with pytest.raises(ValueError, match="exists and is not empty"):
        stream(tmp_path)
    assert stream(tmp_path, overwrite=True)["proof"] == "tensors"


# ---- the command ----
def test_the_command_takes_a_plan_in_place_of_a_recipe(made, tmp_path, capsys):
    made(tiny_llama())
    words = [f"model.path={tmp_path / 'dense'}", f"output.path={tmp_path / 'out'}"]
    assert main(["prune", "--plan", str(tmp_path), *words]) == 0
    assert f"Saved to {tmp_path / 'out'} (DmsLlamaForCausalLM)" in capsys.readouterr().out
    assert main(["prune", "--plan", str(tmp_path), *words]) == 2
    assert main(["prune", "--plan", str(tmp_path / "out"), *words, "output.overwrite=true"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.yaml"], "An override is section.key=value, got 'recipe.yaml'"),
        (["output.path=x"], "model.path is required"),
        (["model.path=x"], "output.path is required"),
        (["model.path=x", "output.path=y", "model.dtype=float32"], "Unknown key model.dtype"),
        (["model.path=x", "output.path=y", "dms.target=0.5"], "Unknown key dms"),
        (["model=x", "output.path=y"], "model must be a section with keys"),
    ],
)
def test_what_a_cut_by_a_plan_has_no_use_for_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        cut_options(words)
