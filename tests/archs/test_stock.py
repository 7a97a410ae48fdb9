"""What a stock config can express: the limits of a description, for every question that is asked about them."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny import tiny_llama
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from hf_dms import DMSConfig
from hf_dms.archs.bert import BERT
from hf_dms.archs.bind import bind
from hf_dms.archs.electra import ELECTRA
from hf_dms.archs.llama import LLAMA
from hf_dms.archs.spec import Dim, with_dims
from hf_dms.archs.stock import (
    Divisor,
    divisors,
    excluded_sizes,
    has_alternative,
    held_by_fixed,
    limits_in_words,
    padded_sizes,
    tied_sizes,
    within_limits,
)

BERT_SIZES = dict(hidden_size=12, num_attention_heads=3, intermediate_size=8, num_hidden_layers=1, vocab_size=9)


def bound_bert():
    with torch.device("meta"):
        return bind(BERT, BertModel(BertConfig(**BERT_SIZES)))


def test_limits_bind_only_where_no_alternative_or_another_side_is_free():
    def limits(gated=("kv", "mlp", "hidden", "layers"), overrides=None, **options):
        model = tiny_llama(**(overrides or {}))
        return divisors(bind(LLAMA, model), DMSConfig(target=1.0, **options), model.config, gated)

    heads = [Divisor("kv", 2, "hidden")]
    assert limits() == heads
    assert limits(layout="per_layer") == []
    assert limits(layout="padded") == []
    assert limits(("mlp", "layers")) == []
    assert limits(("kv",)) == []
    assert limits(("kv",), {"mlp_bias": True}) == heads
    assert limits(("hidden", "kv"), round_to={"hidden": 4}) == []
    assert limits(("hidden", "kv"), {"attention_bias": True}, round_to={"hidden": 4}) == heads


@pytest.mark.parametrize(
    ("overrides", "expected"), [({}, True), ({"attention_bias": True}, False), ({"mlp_bias": True}, False)]
)
def test_a_llama_has_mistral_as_an_alternative_unless_it_has_biases(overrides, expected):
    assert has_alternative(LLAMA, tiny_llama(**overrides).config) is expected
    assert not has_alternative(replace(LLAMA, alternative=None), tiny_llama(**overrides).config)


def test_dims_that_the_config_ties_are_pruned_together_in_a_uniform_layout_only():
    bound = bound_bert()
    uniform, per_layer = DMSConfig(target=0.5), DMSConfig(target=0.5, layout="per_layer")
    assert tied_sizes(bound, uniform, ["heads", "mlp", "hidden"]) == {"hidden": "heads"}
    assert tied_sizes(bound, uniform, ["mlp"]) == {}
    assert tied_sizes(bound, per_layer, ["heads"]) == {}
    with pytest.raises(ValueError, match=r"needs hidden = 4·heads, .* Prune both, or use layout: per_layer or padded"):
        tied_sizes(bound, uniform, ["heads"])


def test_dims_that_the_config_ties_to_a_fixed_size_stay_whole_in_a_uniform_layout():
    fixed = replace(BERT, dims=with_dims(BERT.dims, Dim("hidden", "hidden_size")))
    bound = replace(bound_bert(), spec=fixed)
    assert held_by_fixed(fixed) == {"heads": "hidden"}
    assert held_by_fixed(BERT) == {}
    assert tied_sizes(bound, DMSConfig(target=0.5), ["mlp"]) == {}
    assert tied_sizes(bound, DMSConfig(target=0.5, layout="padded"), ["heads"]) == {}
    message = (
        r"needs hidden = 4·heads, and hidden cannot be pruned, so heads cannot either. Leave it out of dms.prune, or"
    )
    with pytest.raises(ValueError, match=message):
        tied_sizes(bound, DMSConfig(target=0.5), ["mlp", "heads"])
    assert limits_in_words(fixed) == ["without `heads`"]


def test_the_excluded_size_is_that_of_the_dim_that_decides():
    sizes = dict(hidden_size=12, embedding_size=6, num_attention_heads=4, intermediate_size=8, num_hidden_layers=1)
    bound = bind(ELECTRA, ElectraModel(ElectraConfig(**sizes, vocab_size=9)))
    assert excluded_sizes(bound, {"hidden": None}) == {"hidden": 6}
    assert excluded_sizes(bound, {"hidden": "heads", "heads": None}) == {"heads": 2}  # two heads of three: hidden 6
    assert excluded_sizes(bound, {"mlp": None}) == {}


def test_padding_reaches_the_next_size_that_the_config_has():
    model = tiny_llama(attention_bias=True)  # no Mistral has it, so heads must divide hidden = 24
    bound = bind(LLAMA, model)
    wide = bound.sizes | {"kv": 5, "mlp": 7}
    assert padded_sizes(bound, [bound.sizes | {"kv": 1, "mlp": 9}, wide], model.config)["kv"] == 6
    assert padded_sizes(bound, [wide], tiny_llama().config)["kv"] == 5
    assert padded_sizes(bound, [bound.sizes | {"mlp": 9}, wide], model.config)["mlp"] == 9


def test_sizes_are_within_the_limits_that_mention_a_dim():
    sizes = {"kv": 3, "rep": 2, "hidden": 25}
    assert not within_limits(LLAMA, sizes)
    assert within_limits(LLAMA, sizes | {"hidden": 30})
    assert within_limits(LLAMA, sizes, "mlp")
    assert not within_limits(LLAMA, sizes, "kv")


def test_limits_are_told_in_words():
    limit = "`hidden_size` a multiple of `num_attention_heads`"
    assert limits_in_words(LLAMA) == [f"{limit}, else written as `mistral`"]
    assert limits_in_words(replace(LLAMA, alternative=None)) == [limit]
    assert limits_in_words(replace(LLAMA, must_divide=(("rep d", "hidden"),), alternative=None)) == [
        "`hidden_size` a multiple of `rep·d`"
    ]
    assert limits_in_words(BERT) == ["`heads` and `hidden` only together"]
    assert limits_in_words(replace(BERT, must_equal=())) == []
