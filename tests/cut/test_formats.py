"""The cut model's class: the stock class where it can hold the model, else the per-layer class."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny import search_, tiny_llama, token_batch
from transformers import LlamaForCausalLM, MistralForCausalLM

from hf_dms import DMSConfig, attach_, prune, save_pruned
from hf_dms.archs.bind import bind
from hf_dms.archs.llama import LLAMA
from hf_dms.archs.registry import ARCHS
from hf_dms.cut.formats import layer_description, pruned_class_and_config
from hf_dms.cut.plan import Plan

STOCK, PER_LAYER = LlamaForCausalLM.__name__, "DmsLlamaForCausalLM"


def written(layout, overrides=None, **kept):
    """Class and config of the cut model, from the number of kept units per dim and row."""
    model = tiny_llama(**(overrides or {}))
    plan = Plan({name: tuple(torch.arange(count) for count in counts) for name, counts in kept.items()})
    return pruned_class_and_config(model, bind(LLAMA, model), plan, layout)


def test_a_plan_says_how_many_units_stay():
    assert Plan({"mlp": (torch.arange(2), torch.arange(3))}).sizes == {"mlp": [2, 3]}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (dict(mlp=(5, 5, 5)), STOCK),
        (dict(mlp=(5, 5, 6)), PER_LAYER),
        (dict(mlp=(5, 5, 6), layers=(2,)), STOCK),  # the third layer is dropped, and the others are equal
        (dict(hidden=(12,), layers=(1,)), STOCK),
        (dict(kv=(2, 2, 2)), STOCK),  # 4 heads divide 24
        (dict(hidden=(13,)), MistralForCausalLM.__name__),
        (dict(kv=(1, 2, 2)), PER_LAYER),
    ],
)
def test_the_plainest_form_that_can_hold_the_model_is_written(layout, kept, expected):
    cls, config = written(layout, **kept)
    assert cls.__name__ == expected
    if expected == PER_LAYER:
        assert config.model_type == "dms_llama"
        assert set(config.auto_map) >= {"AutoConfig", "AutoModelForCausalLM"}
    else:
        assert "dms" not in str(config.to_dict())


def test_biases_that_rule_out_a_mistral_leave_the_per_layer_form_or_an_error():
    biases = {"attention_bias": True}
    assert written("per_layer", biases, hidden=(13,))[0].__name__ == PER_LAYER
    with pytest.raises(ValueError, match=r"LlamaConfig cannot express the sizes .*13.* Use layout: per_layer"):
        written("uniform", biases, hidden=(13,))
    with pytest.raises(ValueError, match=r"LlamaConfig cannot express the sizes .*13.* Use layout: per_layer"):
        written("padded", biases, hidden=(13,))


def test_layers_are_padded_to_the_widest_one_that_is_kept():
    cls, config = written("padded", mlp=(5, 9, 20), kv=(1, 2, 3), layers=(2,))
    assert cls is LlamaForCausalLM
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads) == (9, 2, 4)
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 24, 4)


@pytest.mark.parametrize(
    ("biases", "kv", "hidden", "expected", "padded_kv"),
    [
        (False, (5, 4, 1), 24, MistralForCausalLM, 5),
        (False, (3, 2, 1), 13, MistralForCausalLM, 3),
        (False, (3, 2, 1), 24, LlamaForCausalLM, 3),
        (True, (3, 2, 1), 24, LlamaForCausalLM, 3),
        (True, (5, 4, 1), 24, LlamaForCausalLM, 6),  # 5 heads do not divide 24, and no Mistral has biases
    ],
)
def test_padding_goes_no_further_than_some_stock_config_needs(biases, kv, hidden, expected, padded_kv):
    overrides = dict(num_key_value_heads=6, attention_bias=biases)
    cls, config = written("padded", overrides, kv=kv, hidden=(hidden,))
    assert cls is expected
    assert config.num_key_value_heads == config.num_attention_heads == padded_kv


def test_per_layer_configs_record_what_differs_from_the_widest_layer():
    _, config = written("per_layer", mlp=(5, 9, 9), kv=(3, 3, 2))
    values = config.to_dict()
    assert (values["intermediate_size"], values["num_key_value_heads"], values["num_attention_heads"]) == (9, 3, 6)
    recorded = {int(index): sizes for index, sizes in values["per_layer_config"].items()}
    assert recorded == {0: {"intermediate_size": 5}, 2: {"num_attention_heads": 4, "num_key_value_heads": 2}}


def test_a_list_of_layer_types_loses_those_of_dropped_layers():
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    plan = Plan({"layers": (torch.tensor([1, 2]),)})
    _, config = pruned_class_and_config(model, bind(LLAMA, model), plan, "uniform")
    assert config.layer_types == ["sliding_attention", "full_attention"]


def test_the_layer_description_holds_this_variants_parameters_only():
    plain, biased = tiny_llama(), tiny_llama(mlp_bias=True)
    assert not [name for name in layer_description(bind(LLAMA, plain))["axes"] if name.endswith("bias")]
    biases = [name for name in layer_description(bind(LLAMA, biased))["axes"] if name.endswith("bias")]
    assert biases == ["mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"]
    assert set(layer_description(bind(LLAMA, plain))["dims"]) == {"kv", "mlp", "hidden", "rep", "d"}


def test_a_line_of_a_layer_that_says_at_how_many_positions_it_runs_reloads(monkeypatch, tmp_path):
    lines = {name: f"{axes} @ 1" if "mlp.gate" in name else axes for name, axes in LLAMA.params.items()}
    monkeypatch.setitem(ARCHS, "llama", replace(LLAMA, params=lines))
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.7, layout="per_layer", prune=("mlp",)))
    search_(model)
    pruned = prune(model, inputs=token_batch())
    assert type(pruned).__name__ == "DmsLlamaForCausalLM"
    assert save_pruned(pruned, tmp_path / "out", inputs=token_batch()) < 1e-5
