"""The description of an architecture, bound to live models: it accounts for every parameter, and counts them."""

import dataclasses
import re

import pytest
import torch
from helpers.laws import tiny
from helpers.tiny import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    ElectraModel,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from hf_dms.archs.axes import flat, parse_axes
from hf_dms.archs.bind import bind, dim_size
from hf_dms.archs.costs import build_cost
from hf_dms.archs.electra import ELECTRA
from hf_dms.archs.llama import LLAMA
from hf_dms.archs.registry import ARCHS, spec_for
from hf_dms.archs.spec import LIMITS, NAMED_PRODUCTS, PRODUCTS, ArchSpec, Dim, check_spec, with_dims
from hf_dms.archs.stages import in_stages

HEADS = (
    LlamaModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaForQuestionAnswering,
)


def dense(bound):
    return {name: torch.tensor([size]) for name, size in bound.sizes.items()}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("hidden", (("hidden",),)),
        ("vocab hidden", (("vocab",), ("hidden",))),
        ("(kv rep d) hidden", (("kv", "rep", "d"), ("hidden",))),
        ("hidden (kv rep d)", (("hidden",), ("kv", "rep", "d"))),
        ("label pool @ 1", (("label",), ("pool",))),
        ("hidden rgb side side @ patches", (("hidden",), ("rgb",), ("side",), ("side",))),
    ],
)
def test_axis_strings_read_as_in_einops(text, axes):
    assert parse_axes(text) == axes


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_binding_accounts_for_every_parameter(head, overrides):
    model = tiny_llama(head, **overrides)
    bound = bind(LLAMA, model)
    assert set(bound.params) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, param in bound.params.items():
        assert tuple(model.get_parameter(name).shape) == tuple(bound.product(axis) for axis in param.axes)
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        assert param.layer == layer
    assert bound.layers_path in dict(model.named_modules())
    assert (bound.num_layers, bound.rows("mlp"), bound.rows("hidden"), bound.depth) == (3, 3, 1, "layers")


@given(
    st.sampled_from(HEADS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_the_count_of_the_dense_model_is_numel(head, kv, rep, head_dim, mlp, layers, bias, tied):
    model = tiny_llama(
        head,
        num_key_value_heads=kv,
        num_attention_heads=kv * rep,
        head_dim=head_dim,
        hidden_size=6 * kv * rep,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
    )
    bound = bind(LLAMA, model)
    cost = build_cost(bound, model, "params", "model", None)
    assert int(cost.count(dense(bound))) == sum(parameter.numel() for parameter in model.parameters())
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in model.get_submodule(bound.layers_path)]
    assert (
        cost.per_layer(dense(bound)).tolist() == [per_layer] * 1 or cost.per_layer(dense(bound)).tolist() == per_layer
    )


def test_tied_weights_count_once():
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    counts = [
        build_cost(bind(LLAMA, m), m, "params", "model", None).count(dense(bind(LLAMA, m))) for m in (tied, untied)
    ]
    assert int(counts[1] - counts[0]) == 33 * 24
    assert bind(LLAMA, tied).tied == {"lm_head.weight"}
    assert bind(LLAMA, untied).tied == frozenset()


def test_a_model_on_the_meta_device_can_be_bound():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    assert bind(LLAMA, model).params == bind(LLAMA, tiny_llama()).params


@pytest.mark.parametrize(
    ("size", "expected"),
    [("7", 7), ("hidden_size", 24), ("hidden_size // head_dim", 6), ("4 * hidden_size", 96), ("sizes[1] * 2", 18)],
)
def test_a_dim_size_is_a_number_an_attribute_an_entry_a_quotient_or_a_product(size, expected):
    config = tiny_llama().config
    config.sizes = [5, 9]
    assert dim_size(Dim("x", size), config) == expected


def test_costs_that_cannot_be_are_errors():
    model = tiny_llama()
    bound = bind(LLAMA, model)
    with pytest.raises(ValueError, match=r"resource macs needs dms.sequence_length: the number of tokens"):
        build_cost(bound, model, "macs", "model", None)
    without = dataclasses.replace(bound, spec=dataclasses.replace(LLAMA, cache=None))
    with pytest.raises(ValueError, match=r"kv_bytes: llama keeps no key-value cache. Use resource: params or macs"):
        build_cost(without, model, "kv_bytes", "model", None)


# ---- the descriptions themselves ----
@pytest.mark.parametrize("spec", ARCHS.values(), ids=ARCHS)
def test_a_description_is_consistent_and_has_no_dim_that_nothing_uses(spec):
    spec = in_stages(spec, 2)
    check_spec(spec)
    lines = [*spec.params.values(), *(line for head in spec.heads.values() for line in head.values())]
    used = {factor for line in lines for factor in flat(parse_axes(line))} | {*spec.stacks}
    used |= {factor for limit in spec.must_equal for product in limit for factor in product.split()}
    used |= {line.partition("@")[2].strip() for line in lines} | {*spec.tokens.split(), *spec.image.split()}
    written = {*spec.config.values()}  # a fixed size may be there for the config alone, or for an attribute
    written |= {factor for product in spec.attributes.values() for factor in product.partition("**")[0].split()}
    assert {dim.name for dim in spec.dims if dim.scope != "fixed" or dim.name not in written} <= used


WRONG = {
    "params": LLAMA.params | {"norm.weight": "nothing"},
    "buffers": {"norm.running_mean": "nothing"},
    "heads": {"ForX": {"score.weight": "label nothing"}},
    "config": LLAMA.config | {"width": "nothing"},
    "attributes": {"layers.{i}.size": "nothing ** -0.5"},
    "attentions": {"layers.{i}.attn": "kv nothing"},
    "outputs": {"pooler_output": "nothing"},
    "attention": "kv nothing",
    "cache": "nothing",
    "tokens": "nothing",
    "image": "nothing height",
    "must_divide": (("kv", "nothing"),),
    "must_equal": (("nothing", "hidden"),),
    "must_differ": (("nothing", "hidden"),),
    "dims": with_dims(LLAMA.dims, Dim("pool", "1", follows="nothing")),
}
NO_DIMS = {
    *("model_type", "layers", "config_ratios", "config_lists", "config_leaves_out", "unnormed", "must_be_false"),
    *("build_with", "alternative", "alternative_overrides", "alternative_needs"),
    *("stages", "families", "variants", "records_positions", "channels_first", "response_norms"),
    *(
        "must_be_true",
        "must_have_one_entry",
        "masked_batch_norms",
        "whole",
        "chained",
        "per_layer_only",
        "by_number",
        "query_scores",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_dim_that_there_is_not_is_an_error_wherever_it_is_named(name):
    with pytest.raises(ValueError, match="names 'nothing', which is none of the dims kv, mlp, hidden, layers"):
        check_spec(dataclasses.replace(LLAMA, **{name: WRONG[name]}))


def test_every_field_of_a_description_is_checked_and_renamed_or_names_no_dims():
    fields = {field.name for field in dataclasses.fields(ArchSpec)}
    assert fields == WRONG.keys() | NO_DIMS
    assert WRONG.keys() == {"dims", "heads", "cache", *NAMED_PRODUCTS, *PRODUCTS, *LIMITS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": LLAMA.params | {"norm.weight": "hidden @ nothing"}}, "'norm.weight' names 'nothing'"),
        (
            {"params": LLAMA.params | {"norm.weight": "(hidden"}},
            r"the entry 'norm.weight' is '\(hidden', expected a list of axes",
        ),
        (
            {"params": LLAMA.params | {"norm.weight": "hidden @"}},
            "the entry 'norm.weight' is 'hidden @', expected a list of axes",
        ),
        ({"config": {"head_dim": "d"}}, "'kv' can be pruned, but no attribute in `config` holds its size"),
        ({"build_with": {"heads": 1}}, "`build_with` mentions 'heads', which `config` does not: num_attention_heads"),
        (
            {"config_ratios": {"ratio": ("mlp", "hidden_size")}},
            "`config_ratios` mentions 'mlp', which `config` does not",
        ),
        ({"unnormed": ("proj",)}, "`unnormed` mentions 'proj', but `params` has no 'proj.weight'"),
        ({"channels_first": ("proj",)}, "`channels_first` mentions 'proj', but `params` has no 'proj.weight'"),
        ({"response_norms": ("proj",)}, "`response_norms` mentions 'proj', but `params` has no 'proj.weight'"),
        ({"chained": ("stages",)}, "`chained` mentions 'stages', which is none of layers"),
        ({"by_number": {"layers.{i}.size": lambda config, number: number}}, "needs per_layer_only=True and stages"),
        ({"dims": LLAMA.dims[:3]}, "scope='depth' and be called layers"),
    ],
)
def test_a_description_that_contradicts_itself_is_an_error(change, message):
    spec = dataclasses.replace(LLAMA, **({"dims": LLAMA.dims} | change))
    if "dims" in change:  # without its layers, and whatever names them
        spec = dataclasses.replace(spec, config={"head_dim": "kv mlp hidden"}, params={}, must_divide=())
        spec = dataclasses.replace(spec, attention="", cache=None)
    with pytest.raises(ValueError, match=message):
        check_spec(spec)


@pytest.mark.parametrize(("embedding", "one"), [(24, True), (12, False)])
def test_a_bound_model_has_sizes_of_its_dims_and_no_others(embedding, one):
    bound = bind(ELECTRA, tiny(ElectraModel, hidden_size=24, embedding_size=embedding))
    assert list(bound.sizes) == [dim.name for dim in bound.spec.dims]
    assert ("embedding" not in bound.sizes) is one


def test_one_name_for_two_dims_is_used_everywhere():
    spec = dataclasses.replace(
        ELECTRA,
        dims=with_dims(ELECTRA.dims, Dim("pool", "hidden_size", scope="model", follows="embedding")),
        params=ELECTRA.params | {"x.weight": "label hidden @ embedding"},
        attributes={"encoder.layer.{i}.size": "embedding ** -0.5"},
        outputs={"pooler_output": "embedding"},
        attentions={"encoder.layer.{i}": "embedding"},
        attention="embedding", cache="embedding", tokens="embedding", image="embedding type",
        must_divide=(("heads", "embedding"),),
        must_equal=(("embedding", "hidden"), ("heads d", "embedding")),
    )  # fmt: skip
    found = spec.with_one_name("embedding", "hidden")
    assert re.search(r"\bembedding\b", str(dataclasses.replace(spec, params={}, heads={})))
    without_keys = dataclasses.replace(
        found,
        **{key: tuple(getattr(found, key).values()) for key in NAMED_PRODUCTS if key != "buffers"},
    )
    assert not re.search(r"'embedding'|\bembedding \*\*|embedding type|@ embedding", str(without_keys))
    assert found.dim("pool").follows == "hidden"
    assert (found.must_equal, found.must_differ) == ((("heads d", "hidden"),), ())
    assert (found.attention, found.cache, found.image) == ("hidden", "hidden", "hidden type")
    assert found.params["x.weight"] == "label hidden @ hidden"
    check_spec(found)


def test_a_spec_is_found_by_model_type():
    assert spec_for(tiny_llama().config) is LLAMA


def test_a_dim_size_can_be_a_function_of_the_config():
    assert dim_size(Dim("x", lambda config: config.hidden_size + 1), tiny_llama().config) == 25


def test_dims_are_replaced_by_name_and_added_at_the_end():
    dims = (Dim("a", "1"), Dim("b", "2"))
    assert with_dims(dims, Dim("c", "3"), Dim("a", "4")) == (Dim("a", "4"), Dim("b", "2"), Dim("c", "3"))


def test_a_line_of_a_head_holds_for_classes_of_that_ending_only():
    spec = dataclasses.replace(LLAMA, heads={"ForTokenClassification": {"score.weight": "label hidden @ 1"}})
    length = 7
    for head, positions in ((LlamaForTokenClassification, 1), (LlamaForSequenceClassification, None)):
        model = tiny_llama(head)
        bound = bind(spec, model)
        assert bound.params["score.weight"].positions == positions
        macs = build_cost(bound, model, "macs", "model", length).model
        assert macs[("hidden",)] == pytest.approx(3 / length if positions == 1 else 3)
