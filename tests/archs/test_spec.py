"""The description of an architecture, bound to live models: it accounts for every parameter, and counts them."""

import dataclasses

import pytest
import torch
from helpers.tiny import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from hf_dms.archs.bind import bind, dim_size
from hf_dms.archs.costs import build_cost
from hf_dms.archs.llama import LLAMA
from hf_dms.archs.registry import ARCHS, spec_for
from hf_dms.archs.spec import Dim, parse_axes, with_dims

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


@pytest.mark.parametrize(("size", "expected"), [("7", 7), ("hidden_size", 24), ("hidden_size // head_dim", 6)])
def test_a_dim_size_is_a_number_an_attribute_or_a_quotient(size, expected):
    assert dim_size(Dim("x", size), tiny_llama().config) == expected


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
def test_a_description_is_consistent(spec):
    names = [dim.name for dim in spec.dims]
    assert len(set(names)) == len(names)
    lines = [*spec.params.values(), *(line for head in spec.heads.values() for line in head.values())]
    used = {factor for line in lines for axis in parse_axes(line) for factor in axis}
    used |= {spec.dim(name).name for name in names if spec.dim(name).scope == "depth"}
    positions = {where for line in lines if (where := line.partition("@")[2].strip()) and not where.isdigit()}
    used |= {*positions, *spec.tokens.split(), *spec.image.split()}
    assert used == set(names)
    remembered = [product.partition("**")[0] for product in spec.attributes.values()]
    products = [*spec.config.values(), *remembered, spec.attention, spec.cache or ""]
    products += [product for pair in spec.must_divide + spec.must_equal + spec.must_differ for product in pair]
    assert {factor for product in products for factor in product.split()} <= set(names)
    assert sum(dim.scope == "depth" for dim in spec.dims) == 1
    assert set(spec.prunable) <= {factor for product in spec.config.values() for factor in product.split()}
    assert all(line.count("(") == line.count(")") for line in lines)
    assert set(spec.build_with) <= {*spec.config, *spec.config_ratios}
    assert {attribute for pair in spec.config_ratios.values() for attribute in pair} <= set(spec.config)
    assert {dim.follows for dim in spec.dims} | {dim.same_as for dim in spec.dims} <= {None, *spec.prunable}
    assert {f"{path}.weight" for path in spec.unnormed} <= set(spec.params)


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
