"""Encoders obey the laws that Llama does: masked = cut = reloaded, counted = real, stock where the layout says so."""

import pytest
import torch
from conftest import lowest_target, relative_difference, search_, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_dms import DMSConfig, attach_, prune
from hf_dms.checkpoint import save_pruned
from hf_dms.masking import gates_of
from hf_dms.rounding import round_sizes
from hf_dms.slicing import make_plan
from hf_dms.verify import dummy_inputs, hard_masked

TEXT = dict(vocab_size=33, max_position_embeddings=16, num_labels=3)
IMAGE = dict(image_size=12, patch_size=4, num_channels=2, num_labels=3)
SIZES = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4)
CONFIGS = {"bert": (BertConfig, TEXT), "vit": (ViTConfig, IMAGE)}
HEADS = (
    BertModel,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMaskedLM,
    ViTModel,
    ViTForImageClassification,
)
DIMS = ("heads", "mlp", "hidden", "layers")
# float64: the same sums in another order. float32: 2^-24 times some tens of roundings.
EXACT, SHIPPED = 1e-9, 1e-5


def tiny(cls, seed=0, dtype=torch.float32, attn="sdpa", **overrides):
    """A model whose weights are drawn from normal(0, 0.3), its norms' from normal(1, 0.3): no unit is like another."""
    config_class, sizes = CONFIGS[cls.config_class.model_type]
    overrides = {"num_labels": 2} | overrides if cls.__name__.endswith("QuestionAnswering") else overrides
    model = cls._from_config(config_class(**(sizes | SIZES | overrides)), attn_implementation=attn).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3, generator=generator)
    return model.to(dtype)


def batch_for(model, length=7, batch=2):
    inputs = dummy_inputs(model) if model.main_input_name == "pixel_values" else token_batch(batch, length)
    return {name: tensor[:batch] for name, tensor in inputs.items()}


def searched(model, seed=0, share=0.4, **options):
    """Put gates on a model as a search would leave them; the target lies between the lowest possible one and 1."""
    attach_(model, DMSConfig(**({"target": 1.0, "sequence_length": 7} | options)))
    search_(model, seed)
    gates = gates_of(model)
    bound, config = gates.attachment.bound, gates.attachment.config
    lowest = lowest_target(gates, bound, config, model.config)
    config.target = lowest + share * (1 - lowest)
    return gates, round_sizes(gates, bound, config, model.config)


def all_outputs(model, inputs):
    """Every tensor that a model returns."""
    with torch.no_grad():
        return {name: tensor for name, tensor in model(**inputs).items() if isinstance(tensor, torch.Tensor)}


def masked_cut_reloaded(model, sizes, folder):
    """All outputs of the hard-masked, the cut and the reloaded model, and the cut one itself."""
    inputs = batch_for(model)
    pruned = prune(model, inputs=inputs)
    with hard_masked(model, sizes):
        masked = all_outputs(model, inputs)
    kept = make_plan(gates_of(model), sizes).kept
    for name, dim in (("last_hidden_state", "hidden"), ("pooler_output", "pool")):
        if name in masked and dim in kept:
            masked[name] = masked[name][..., kept[dim][0]]
    save_pruned(pruned, folder, inputs=inputs)
    reloaded = type(pruned).from_pretrained(folder, dtype=pruned.dtype)
    return masked, all_outputs(pruned, inputs), all_outputs(reloaded, inputs), pruned


def assert_same(masked, cut_, reloaded, tolerance):
    assert masked.keys() == cut_.keys() == reloaded.keys()
    for name in masked:
        assert relative_difference(cut_[name], masked[name]) < tolerance
        assert relative_difference(reloaded[name], cut_[name]) < tolerance


def macs_by_the_flop_counter(model, scope, inputs, length):
    """Multiply-accumulates of one forward pass of one sequence, per token; under sdpa attention is not counted."""
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    layers = [flops for name, flops in by_module.items() if name.rpartition(".")[2].isdigit()]
    return (sum(layers) if scope == "layers" else by_module["Global"]) / 2 / length


def is_stock(model):
    return type(model).__module__.startswith("transformers.")


def possible(cls, dims, layout):
    """A stock BERT has hidden = heads·d, so neither is pruned alone."""
    together = cls.config_class is BertConfig and layout == "uniform"
    return not together or (("heads" in dims) == ("hidden" in dims))


# ---- masked = cut = reloaded ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("dims", [*[(dim,) for dim in DIMS], ("heads", "hidden"), DIMS], ids="-".join)
@pytest.mark.parametrize("head", HEADS)
def test_masked_equals_cut_equals_reloaded(head, dims, layout, tmp_path):
    if not possible(head, dims, layout):
        with pytest.raises(ValueError, match="bert needs hidden = 6·heads, so heads and hidden can only be pruned tog"):
            attach_(tiny(head), DMSConfig(target=0.9, prune=dims, layout=layout))
        return
    model = tiny(head, dtype=torch.float64)
    _, sizes = searched(model, prune=dims, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("head", HEADS)
def test_masked_equals_cut_equals_reloaded_as_shipped(head, layout, tmp_path):
    model = tiny(head)
    _, sizes = searched(model, layout=layout)
    *outputs, _ = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)


@st.composite
def requests(draw):
    heads, layout = draw(st.integers(1, 4)), draw(st.sampled_from(["uniform", "per_layer"]))
    head = draw(st.sampled_from(HEADS))
    config = dict(
        num_attention_heads=heads,
        hidden_size=heads * draw(st.sampled_from([2, 3, 5])),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
    )
    if head.config_class is ViTConfig:
        config["image_size"] = draw(st.sampled_from([8, (8, 12)]))
        config["patch_size"] = draw(st.sampled_from([4, (4, 2)]))
        config["qkv_bias"] = draw(st.booleans())
        config |= draw(st.sampled_from([{}, {"head_dim": 3}, {"pooler_output_size": 5}]))
    dims = tuple(draw(st.lists(st.sampled_from(DIMS), min_size=1, unique=True)))
    if not possible(head, dims, layout):
        dims = tuple({*dims, "heads", "hidden"})
    options = dict(
        prune=dims,
        layout=layout,
        resource=draw(st.sampled_from(["params", "macs"])),
        resource_scope=draw(st.sampled_from(["model", "layers"])),
    )
    return head, config, options, draw(st.integers(0, 1000)), draw(st.floats(0, 1))


@given(requests())
@settings(max_examples=60)
def test_the_laws_hold_for_any_config(tmp_path_factory, request_):
    head, config, options, seed, share = request_
    model = tiny(head, seed, torch.float64, **config)
    gates, sizes = searched(model, seed, share, **options)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path_factory.mktemp("law") / "out")
    assert_same(*outputs, EXACT)
    assert options["layout"] == "per_layer" or is_stock(pruned)
    counted, scope = float(gates.count(gates.dense_sizes() | sizes)), options["resource_scope"]
    assert counted <= gates.attachment.config.target * gates.dense_resource
    if options["resource"] == "params":
        whole = pruned.get_submodule(gates.attachment.bound.layers_path) if scope == "layers" else pruned
        assert counted == sum(parameter.numel() for parameter in whole.parameters())
    else:
        length = gates.attachment.bound.sizes.get("tokens", 7)
        found = macs_by_the_flop_counter(pruned, scope, batch_for(pruned, batch=1), length)
        assert counted == pytest.approx(found, rel=1e-12)
