"""Encoders obey the laws that Llama does: masked = cut = reloaded, counted = real, stock where the layout says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.laws import (
    EXACT,
    SHIPPED,
    TASKS,
    assert_same,
    batch_for,
    heads_of,
    is_stock,
    macs_by_the_flop_counter,
    masked_cut_reloaded,
    searched,
    tiny,
    written_sizes,
)
from helpers.tiny import relative_difference, search_
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CamembertForTokenClassification,
    Dinov2ForImageClassification,
    ElectraForMaskedLM,
    ElectraForSequenceClassification,
    ViTForImageClassification,
    ViTModel,
    XLMRobertaForMaskedLM,
)

from hf_dms import DMSConfig, attach_, detach_, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.plan import Plan
from hf_dms.cut.prune import make_plan
from hf_dms.cut.slicing import cut
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import gates_of
from hf_dms.gating.rounding import round_sizes

ROOT = Path(__file__).parents[2]
BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
HEADS = (*heads_of("Bert", *TASKS, "MaskedLM"), *heads_of("ViT", "ImageClassification"))
RELATIVES = (
    *heads_of("Roberta", *TASKS, "MaskedLM"),
    *(XLMRobertaForMaskedLM, CamembertForTokenClassification),
    *heads_of("DistilBert", *TASKS, "MaskedLM"),
    *heads_of("Electra", *TASKS, "MaskedLM"),
    *heads_of("DeiT", "ImageClassification", "ImageClassificationWithTeacher"),
    *heads_of("Dinov2", "ImageClassification"),
    *heads_of("Yolos", "ObjectDetection"),
)
RESNETS = heads_of("ResNet", "ImageClassification")
CONVNETS = (
    *heads_of("ConvNext", "ImageClassification"),
    *heads_of("ConvNextV2", "ImageClassification"),
    *RESNETS,
)
TWINS = (*heads_of("XLMRoberta", *TASKS, "MaskedLM"), *heads_of("Camembert", *TASKS, "MaskedLM"))
# Decoders are loaded here too: a fresh process takes seconds, another model in it hardly any time.
DECODERS = ("Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Gemma", "Gemma2", "Gemma3")
SAVED = (*HEADS, *RELATIVES, *CONVNETS, *(getattr(transformers, f"{name}ForCausalLM") for name in DECODERS))
DIMS = ("heads", "mlp", "hidden", "layers")


# Dims whose sizes the stock config derives from one another.
TIED = {model_type: {"heads", "hidden"} for model_type in (*BERTS, "yolos")}
TIED |= {"convnext": {"mlp", "hidden"}, "convnextv2": {"mlp", "hidden"}, "resnet": {"reduced", "mid", "hidden"}}


def dims_of(cls):
    """The dims of a model class; a convolutional network's are those of all stages together."""
    if cls in RESNETS:
        return ("reduced", "mid", "hidden", "layers")
    return DIMS[1:] if cls in CONVNETS else DIMS


def possible(cls, dims, layout):
    """Stock sizes that go together are pruned together, and padding cannot reach the dense hidden size.

    That is of a BERT hidden = heads·d, of a ConvNeXt mlp = 4·hidden, and of a ResNet hidden = 4·mid.
    """
    tied = TIED.get(cls.config_class.model_type, set())
    if layout == "padded" and "mlp" in dims and cls.config_class.model_type == "convnextv2":
        return False  # its response norms would count the zeros
    if layout == "padded" and tied:
        return "hidden" not in dims
    return layout == "per_layer" or tied & set(dims) in (set(), tied)


# ---- masked = cut = reloaded ----
CANNOT = {  # by layout and whether a response norm is in the way
    (
        "uniform",
        False,
    ): r"needs (mlp0 = 4·hidden0|mid0 = 1·reduced0|hidden0 = 4·reduced0), so .* can only be pruned toget",
    (
        "padded",
        False,
    ): r"ties hidden0 to '(mlp0|four reduced0)', and hidden0 cannot be padded. Prune others only, as prun",
    (
        "padded",
        True,
    ): r"divides by a mean over mlp0, which would count the zeros. Prune others only, as prune: \[layers0",
}


@pytest.mark.parametrize("layout", ["uniform", "per_layer", "padded"])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("head", CONVNETS)
def test_masked_equals_cut_equals_reloaded_in_stages(head, which, layout, tmp_path):
    dims = tuple(dim for place, dim in enumerate(dims_of(head)) if place in which) or dims_of(head)[-1:]
    if not possible(head, dims, layout):
        averaged = layout == "padded" and head.config_class.model_type == "convnextv2" and "mlp" in dims
        with pytest.raises(ValueError, match=CANNOT[layout, averaged]):
            attach_(tiny(head), DMSConfig(target=0.9, prune=dims, layout=layout))
        return
    model = tiny(head, dtype=torch.float64)
    gates, sizes = searched(model, prune=dims, layout=layout)
    bound = gates.attachment.bound
    assert sorted(sizes) == sorted(name for name in bound.prunable if name.rstrip("012") in dims)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("dims", [*[(dim,) for dim in DIMS], ("heads", "hidden"), DIMS], ids="-".join)
@pytest.mark.parametrize("head", [*HEADS, ElectraForMaskedLM, Dinov2ForImageClassification])
def test_masked_equals_cut_equals_reloaded(head, dims, layout, tmp_path):
    if not possible(head, dims, layout):
        instead = "per_layer or padded" if dims == ("heads",) else "per_layer"
        message = f"needs hidden = 6·heads, so .* only be pruned together. Prune both, or use layout: {instead}.$"
        with pytest.raises(ValueError, match=message):
            attach_(tiny(head), DMSConfig(target=0.9, prune=dims, layout=layout))
        return
    model = tiny(head, dtype=torch.float64)
    _, sizes = searched(model, prune=dims, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("head", sorted({*HEADS, *RELATIVES, *TWINS, *CONVNETS}, key=lambda head: head.__name__))
def test_masked_equals_cut_equals_reloaded_as_shipped(head, layout, tmp_path):
    model = tiny(head)
    _, sizes = searched(model, layout=layout)
    *outputs, _ = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)


@st.composite
def requests(draw):
    heads, layout = draw(st.integers(1, 4)), draw(st.sampled_from(["uniform", "per_layer", "padded"]))
    head = draw(st.sampled_from(HEADS + RELATIVES + CONVNETS))
    config = (
        stages(draw, head)
        if head in CONVNETS
        else dict(
            num_attention_heads=heads,
            hidden_size=heads * draw(st.sampled_from([2, 3, 5])),
            intermediate_size=draw(st.integers(1, 12)),
            num_hidden_layers=draw(st.integers(1, 3)),
        )
    )
    if head.main_input_name == "pixel_values" and head not in CONVNETS:
        square = head.config_class.model_type == "dinov2"  # other images it interpolates, for square numbers of patches
        yolos = head.config_class.model_type == "yolos"
        config["image_size"] = 8 if square else draw(st.sampled_from([[8, 8], [8, 12]] if yolos else [8, (8, 12)]))
        config["patch_size"] = 4 if yolos else draw(st.sampled_from([4, (4, 2)]))
        config["qkv_bias"] = draw(st.booleans())
        config |= {} if yolos else draw(st.sampled_from([{}, {"head_dim": 3}, {"pooler_output_size": 5}]))
    if head.config_class.model_type == "electra":
        config["embedding_size"] = draw(st.sampled_from([config["hidden_size"], 1, 5, 7]))
    all_dims = tuple(dim for dim in dims_of(head) if config.get("layer_type") != "basic" or dim != "reduced")
    dims = tuple(draw(st.lists(st.sampled_from(all_dims), min_size=1, unique=True)))
    if not possible(head, dims, layout):
        tied = TIED[head.config_class.model_type] & set(all_dims)
        padded = tuple(dim for dim in dims if possible(head, (dim,), layout))
        dims = (padded or ("layers",)) if layout == "padded" else (*sorted({*dims} | tied),)
    if head in RESNETS and set(dims) == {"layers"} and max(config["depths"]) == 1:
        dims = ("layers", "mid") if layout == "padded" else ("layers", *all_dims[:-1])  # no layer of it can go
    options = dict(
        prune=dims,
        layout=layout,
        resource=draw(st.sampled_from(["params", "macs"])),
        resource_scope=draw(st.sampled_from(["model", "layers"])),
    )
    return head, config, options, draw(st.integers(0, 1000)), draw(st.floats(0, 1))


def stages(draw, head):
    """A config of a network in stages."""
    count = draw(st.integers(1, 3))
    widths = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    config = dict(
        depths=draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        image_size=draw(st.sampled_from([16, (16, 24)])),
    )
    if head not in RESNETS:
        patch = draw(st.sampled_from([2, (4, 2)]))
        return config | dict(num_stages=count, hidden_sizes=widths, patch_size=patch)
    config |= dict(layer_type=draw(st.sampled_from(["basic", "bottleneck"])))
    config |= dict(downsample_in_first_stage=draw(st.booleans()), downsample_in_bottleneck=draw(st.booleans()))
    widths = [4 * width for width in widths] if config["layer_type"] == "bottleneck" else widths
    return config | dict(hidden_sizes=widths, embedding_size=draw(st.sampled_from([widths[0], 3])))


@given(requests())
@settings(max_examples=100)
def test_the_laws_hold_for_any_config(tmp_path_factory, request_):
    head, config, options, seed, share = request_
    model = tiny(head, seed, torch.float64, **config)
    gates, sizes = searched(model, seed, share, **options)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path_factory.mktemp("law") / "out")
    assert_same(*outputs, EXACT)
    assert options["layout"] == "per_layer" or is_stock(pruned)
    counted, scope = float(gates.count(gates.dense_sizes() | sizes)), options["resource_scope"]
    assert counted <= gates.attachment.config.target * gates.dense_resource
    written = float(gates.count(written_sizes(gates, sizes, pruned)))
    bound = gates.attachment.bound
    if options["resource"] == "params":
        parts = [pruned.get_submodule(path) for path in bound.stacks.values()] if scope == "layers" else [pruned]
        assert written == sum(parameter.numel() for part in parts for parameter in part.parameters())
    else:
        length = 1 if head in CONVNETS else bound.sizes.get("tokens", 7)
        stacks = bound.spec.stacks if head in CONVNETS else None
        found = macs_by_the_flop_counter(pruned, scope, batch_for(pruned, batch=1), length, stacks)
        assert written == pytest.approx(found, rel=1e-12)


# ---- what a stock config can express ----
def rounded(model, target, **options):
    attach_(model, DMSConfig(**({"target": target, "sequence_length": 7} | options)))
    search_(model)
    gates, bound = gates_of(model), gates_of(model).attachment.bound
    return gates, round_sizes(gates, bound, gates.attachment.config, model.config)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_a_stock_bert_has_heads_times_the_head_size_for_its_hidden_size(target):
    gates, sizes = rounded(tiny(BertForSequenceClassification), target)
    assert int(sizes["hidden"]) == int(sizes["pool"]) == 6 * int(sizes["heads"][0])
    assert gates.count(gates.dense_sizes() | sizes) <= target * gates.dense_resource
    heads = torch.minimum(sizes["heads"] + 1, torch.tensor(4))
    larger = {"heads": heads, "hidden": 6 * heads[:1], "pool": 6 * heads[:1]}
    assert gates.count(gates.dense_sizes() | sizes | larger) > target * gates.dense_resource


def test_dims_that_go_together_share_one_prune_ratio_and_choose_their_own_units():
    model = tiny(BertForSequenceClassification)
    gates, sizes = rounded(model, 0.5, prune=("heads", "hidden"))
    assert gates.prune_ratio.shape == (1,)
    assert [gates.ratio(name).tolist() for name in ("hidden", "pool")] == 2 * [gates.ratio("heads")[:1].tolist()]
    hard = gates.hard_sizes()
    assert int(hard["hidden"]) == int(hard["pool"]) == 6 * int(hard["heads"][0])
    kept = make_plan(gates, sizes).kept
    assert len(kept["hidden"][0]) == len(kept["pool"][0])
    assert not torch.equal(kept["hidden"][0], kept["pool"][0])


def test_dims_that_go_together_keep_each_others_multiples_and_protection():
    def sizes(**options):
        _, found = rounded(tiny(BertModel), 0.999, prune=("heads", "hidden"), **options)
        return int(found["heads"][0]), int(found["hidden"])

    assert sizes() == (3, 18)
    assert sizes(round_to={"hidden": 4}) == (2, 12)
    assert sizes(round_to={"heads": 2}) == (2, 12)
    assert sizes(protect={"max": {"hidden": 17}}) == (2, 12)
    assert sizes(protect={"min": {"hidden": 13}, "max": {"heads": 3}}) == (3, 18)
    with pytest.raises(
        ValueError, match=r"leave no size for heads and hidden: .* Loosen them, or use layout: per_layer"
    ):
        sizes(protect={"min": {"hidden": 13}, "max": {"hidden": 17}})
    attach_(tiny(BertModel), DMSConfig(target=0.9, layout="per_layer", prune=("hidden",), round_to={"hidden": 5}))


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("head", "heads", "hidden", "stock"),
    [
        (BertForMaskedLM, (3, 3, 3), 18, True),
        (BertForMaskedLM, (3, 3, 3), 20, False),
        (BertForMaskedLM, (3, 3, 4), 24, False),
        (ViTForImageClassification, (3, 3, 3), 20, True),
        (ViTForImageClassification, (3, 3, 2), 20, False),
        (Dinov2ForImageClassification, (3, 3, 3), 18, True),  # 72 is a multiple of it
        (Dinov2ForImageClassification, (3, 3, 3), 20, False),
        (Dinov2ForImageClassification, (3, 3, 2), 18, False),
    ],
)
def test_what_a_stock_config_can_express_is_written_as_stock(head, heads, hidden, stock, layout):
    model = tiny(head)
    bound = bind(spec_for(model.config), model)
    plan = Plan({"heads": tuple(torch.arange(count) for count in heads), "hidden": (torch.arange(hidden),)})
    if layout == "uniform" and not stock and len(set(heads)) == 1:
        with pytest.raises(ValueError, match=r"(Bert|Dinov2)Config cannot express the sizes .* Use layout: per_layer"):
            cut(model, bound, plan, layout)
        return
    pruned = cut(model, bound, plan, layout)
    assert is_stock(pruned) is stock
    assert outputs_of(pruned, batch_for(model)).isfinite().all()


def test_a_follower_has_gates_only_where_the_model_has_its_parameters():
    for cls, expected in ((BertModel, True), (BertForMaskedLM, False), (BertForTokenClassification, False)):
        model = tiny(cls)
        attach_(model, DMSConfig(target=0.5))
        assert ("pool" in gates_of(model).dims) is expected
    model = tiny(BertForSequenceClassification)
    attach_(model, DMSConfig(target=0.9, prune=("mlp",)))
    assert list(gates_of(model).dims) == ["mlp"]


@pytest.mark.parametrize(
    "head",
    [
        BertForSequenceClassification,
        ElectraForSequenceClassification,
        ViTForImageClassification,
        Dinov2ForImageClassification,
        *CONVNETS[1::2],
    ],
)
def test_importance_of_every_dim_follows_from_training(head):
    model = tiny(head)
    attach_(model, DMSConfig(target=0.5, layout="per_layer"))
    search_(model)
    gates = gates_of(model)
    for name in gates.dims:
        gates.raw_importance(name).zero_()
    model.train()(**batch_for(model), labels=torch.tensor([0, 1])).loss.backward()
    gates.update_importance_()
    assert all((gates.raw_importance(name) > 0).any(-1).all() for name in gates.dims)
    gates.resource_loss().backward()
    assert gates.prune_ratio.grad.abs().min() > 0


@pytest.mark.parametrize("head", HEADS + RELATIVES + CONVNETS)
def test_open_gates_are_not_seen_and_taken_off_leave_the_model_as_it_was(head):
    model = tiny(head)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = outputs_of(model, batch_for(model))
    attach_(model, DMSConfig(target=0.5, warmup_steps=1))
    for module in model.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # it would see the batch
    assert relative_difference(outputs_of(model, batch_for(model)), before) < SHIPPED
    detach_(model)
    assert torch.equal(outputs_of(model.eval(), batch_for(model)), before)


@pytest.mark.parametrize("head", [BertForSequenceClassification, ViTForImageClassification])
def test_a_stock_model_can_be_pruned_again(head, tmp_path):
    model = tiny(head, num_attention_heads=6)
    searched(model, prune=DIMS[:3])
    again = prune(model, inputs=batch_for(model))
    _, sizes = searched(again, prune=DIMS[:3])
    *outputs, pruned = masked_cut_reloaded(again, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)
    assert pruned.num_parameters() < again.num_parameters() < model.num_parameters()


def test_costs_that_encoders_do_not_have_are_errors():
    with pytest.raises(ValueError, match=r"bert keeps no key-value cache. Use resource: params or macs"):
        attach_(tiny(BertModel), DMSConfig(target=0.5, resource="kv_bytes"))
    with pytest.raises(ValueError, match=r"resource macs needs dms.sequence_length"):
        attach_(tiny(BertModel), DMSConfig(target=0.5, resource="macs"))
    attach_(tiny(ViTModel), DMSConfig(target=0.5, resource="macs"))  # the image size decides


# ---- folders, each way of loading in a process of its own ----
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
    return {"folder": str(folder), "auto": auto_of(head), "model_type": pruned.config.model_type}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        layout: [saved(head, layout, root / f"{layout}-{head.__name__}") for head in SAVED]
        for layout in ("uniform", "padded", "per_layer")
    }


LOAD = """
import json, sys
jobs, options, preamble = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
exec(preamble)
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
for job in jobs:
    model = getattr(transformers, job["auto"]).from_pretrained(job["folder"], **options).eval()
    assert model.config.model_type == job["model_type"], model.config.model_type
    expected = load_file(job["folder"] + ".outputs")["expected"]
    with torch.no_grad():
        output = model(**load_file(job["folder"] + ".inputs"))
    found = output["logits"] if "logits" in output else output[0]
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, (job, difference)
    print(type(model).__module__, type(model).__name__)
"""
WITHOUT_HF_DMS = "sys.modules['hf_dms'] = None  # as if it were not installed"


def loaded(jobs, tmp_path, preamble, **options):
    """Names of the classes that a fresh process loads the folders with."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, json.dumps(jobs), json.dumps(options), preamble]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split("\n")[: len(jobs)]


def test_uniform_and_padded_folders_are_stock(folders, tmp_path):
    classes = loaded(folders["uniform"] + folders["padded"], tmp_path, WITHOUT_HF_DMS)
    assert [line.rpartition(" ")[2] for line in classes] == 2 * [head.__name__ for head in SAVED]
    assert all(line.startswith("transformers.models.") for line in classes)


def test_per_layer_folders_load_after_import_hf_dms(folders, tmp_path):
    classes = loaded(folders["per_layer"], tmp_path, "import hf_dms")
    assert classes == [f"hf_dms.cut.modeling_dms Dms{head.__name__}" for head in SAVED]


def test_per_layer_folders_load_with_trust_remote_code_without_hf_dms(folders, tmp_path):
    classes = loaded(folders["per_layer"], tmp_path, WITHOUT_HF_DMS, trust_remote_code=True)
    assert [line.rpartition(" ")[2] for line in classes] == [f"Dms{head.__name__}" for head in SAVED]
    assert all(line.startswith("transformers_modules.") for line in classes)


def test_auto_map_names_a_class_for_every_head(folders):
    for job in folders["per_layer"]:
        classes = json.loads((Path(job["folder"]) / "config.json").read_text())["auto_map"]
        family = job["model_type"].removeprefix("dms_")
        assert {
            "AutoConfig",
            *(auto_of(head) for head in SAVED if head.config_class.model_type == family),
        } <= set(classes)


def test_a_per_layer_folder_loads_under_other_heads(folders):
    for job in folders["per_layer"]:
        auto, inputs = getattr(transformers, job["auto"]), load_file(job["folder"] + ".inputs")
        whole, base = auto.from_pretrained(job["folder"]), transformers.AutoModel.from_pretrained(job["folder"])
        found, expected = base(**inputs).last_hidden_state, whole.base_model(**inputs).last_hidden_state
        assert relative_difference(found.detach(), expected.detach()) < SHIPPED
        base_folder = job["folder"] + ".base"
        base.save_pretrained(base_folder)
        again = auto.from_pretrained(base_folder)
        assert relative_difference(again.base_model(**inputs).last_hidden_state.detach(), expected.detach()) < SHIPPED


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
