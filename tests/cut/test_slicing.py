"""The hard-masked model, the cut model and its reloaded folder compute the same."""

import copy
import itertools

import pytest
import torch
import transformers
from helpers.laws import (
    EXACT,
    SHIPPED,
    assert_same,
    macs_by_the_flop_counter,
    masked_cut_reloaded,
    same_tensors,
    searched,
    tiny,
)
from helpers.marks import ordinary_if
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    ResNetForImageClassification,
)

import hf_dms
from hf_dms import DMSConfig, attach_, detach_, prune
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.prune import magnitude_importance, make_plan, plan_of
from hf_dms.cut.slicing import axis_indices, cut, source_names
from hf_dms.cut.verify import check_same, hard_masked, outputs_of
from hf_dms.gating.attach import gates_of

HEADS = (
    LlamaModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaForQuestionAnswering,
)
DIMS = ("kv", "mlp", "hidden", "layers")
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 8},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_equals_cut_equals_reloaded_of_every_variant(variant, layout, tmp_path, exact_norms):
    model = tiny_llama(dtype=torch.float64, **VARIANTS[variant])
    _, sizes = searched(model, layout=layout)
    masked, cut_, reloaded, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(masked, cut_, reloaded, EXACT)
    assert pruned.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(
    ("variant", "dim", "layout"),
    ordinary_if(
        lambda variant, *_: variant == "gqa",
        itertools.product(["gqa", "mha", "tied"], DIMS, ["uniform", "per_layer"]),
    ),
)
def test_masked_equals_cut_equals_reloaded_of_every_dim_alone(variant, dim, layout, tmp_path, exact_norms):
    model = tiny_llama(dtype=torch.float64, **VARIANTS[variant])
    _, sizes = searched(model, layout=layout, prune=(dim,))
    masked, cut_, reloaded, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(masked, cut_, reloaded, EXACT)
    assert pruned.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("head", HEADS)
def test_masked_equals_cut_equals_reloaded_of_every_head_as_shipped(head, layout, tmp_path):
    model = tiny_llama(head)
    _, sizes = searched(model, layout=layout)
    masked, cut_, reloaded, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(masked, cut_, reloaded, SHIPPED)
    assert isinstance(pruned, head) or pruned.config.model_type == "mistral"


@st.composite
def requests(draw):
    rep, kv = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    config = dict(
        num_key_value_heads=kv,
        num_attention_heads=kv * rep,
        head_dim=draw(st.sampled_from([2, 4, 8])),
        hidden_size=kv * rep * draw(st.sampled_from([1, 3, 4])),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )
    options = dict(
        prune=tuple(draw(st.lists(st.sampled_from(DIMS), min_size=1, unique=True))),
        layout=draw(st.sampled_from(["uniform", "per_layer", "padded"])),
        resource=draw(st.sampled_from(["params", "macs", "kv_bytes"])),
        resource_scope=draw(st.sampled_from(["model", "layers"])),
        sequence_length=5,
    )
    if options["layout"] == "padded" and "hidden" in options["prune"]:
        config |= dict(attention_bias=False, mlp_bias=False)  # a Mistral takes any hidden size, but no biases
    return draw(st.sampled_from(HEADS)), config, options, draw(st.integers(0, 1000)), draw(st.floats(0, 1))


@given(requests())
def test_masked_equals_cut_equals_reloaded(tmp_path_factory, exact_norms, request_):
    head, overrides, options, seed, share = request_
    model = tiny_llama(head, seed, torch.float64, **overrides)
    _, sizes = searched(model, seed, share, **options)
    folder = tmp_path_factory.mktemp("law") / "out"
    assert_same(*masked_cut_reloaded(model, sizes, folder)[:3], EXACT)


# ---- generation ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_equals_that_of_the_masked_model(layout, cache):
    model = tiny_llama()
    _, sizes = searched(model, layout=layout)
    pruned = prune(model, inputs=token_batch())
    options = dict(max_new_tokens=12, do_sample=False)
    with hard_masked(model, sizes):
        expected = model.generate(**token_batch(), **options)
    found = pruned.generate(**token_batch(), **options, cache_implementation=cache if cache == "static" else None)
    assert expected.shape == (2, 19)
    assert torch.equal(found, expected)
    assert torch.equal(pruned.generate(**token_batch(), **options, use_cache=False), expected)


# ---- what is counted is what is there ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("scope", ["model", "layers"])
@pytest.mark.parametrize("variant", ["gqa", "tied", "biases"])
def test_counted_params_equal_numel(variant, scope, layout):
    model = tiny_llama(**VARIANTS[variant])
    gates, sizes = searched(model, layout=layout, resource="params", resource_scope=scope)
    pruned = prune(model, inputs=token_batch())
    for counted, owner in ((gates.count(gates.dense_sizes() | sizes), pruned), (gates.dense_resource, model)):
        whole = owner if scope == "model" else owner.model.layers
        parameters = [p for name, p in whole.named_parameters() if not name.startswith("dms_gates")]
        assert int(counted) == sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("scope", ["model", "layers"])
@pytest.mark.parametrize("head", [LlamaForCausalLM, LlamaForTokenClassification])
def test_counted_macs_equal_the_flop_counter(head, scope, layout):
    model = tiny_llama(head, attn="eager")
    inputs = {"input_ids": token_batch(1, 11)["input_ids"], "use_cache": False}
    dense = macs_by_the_flop_counter(model, scope, inputs, 11)
    gates, sizes = searched(model, layout=layout, resource="macs", resource_scope=scope, sequence_length=11)
    pruned = prune(model, inputs=token_batch())
    assert pruned.config._attn_implementation == "eager"
    assert gates.dense_resource == dense
    assert float(gates.count(gates.dense_sizes() | sizes)) == macs_by_the_flop_counter(pruned, scope, inputs, 11)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_kv_bytes_equal_the_cache(layout, dtype):
    model = tiny_llama(dtype=dtype)
    gates, sizes = searched(model, layout=layout, resource="kv_bytes", prune=("kv", "layers"))
    pruned = prune(model, inputs=token_batch())
    cache = pruned(input_ids=token_batch(1, 7)["input_ids"], use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert int(gates.count(gates.dense_sizes() | sizes)) == cached / 7


# ---- the pruned model ----
def test_prune_leaves_the_masked_model_as_it_was():
    model = tiny_llama()
    searched(model)
    model.train()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(gates_of(model).search_state())
    prune(model, inputs=token_batch())
    assert model.training
    assert gates_of(model).rounded is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in gates_of(model).search_state().items())


@pytest.mark.parametrize("dims", [None, ("mlp",)])
def test_the_pruned_model_is_plain_and_shares_no_tensor(dims):
    model = tiny_llama(tie_word_embeddings=True)
    searched(model, prune=dims)
    pruned = prune(model, inputs=token_batch())
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in pointers for parameter in pruned.parameters())
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert not pruned.training
    assert not hasattr(pruned, "dms_gates")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pruned.modules())


def test_uniform_layout_gives_a_stock_config_with_the_pruned_sizes():
    model = tiny_llama()
    _, sizes = searched(model, layout="uniform")
    config = prune(model, inputs=token_batch()).config
    assert config.model_type == "llama"
    assert config.num_key_value_heads == int(sizes["kv"][0])
    assert config.num_attention_heads == 2 * int(sizes["kv"][0])
    assert config.intermediate_size == int(sizes["mlp"][0])
    assert config.hidden_size == int(sizes["hidden"])
    assert config.num_hidden_layers == int(sizes["layers"])
    assert config.head_dim == 4


def test_a_model_keeps_its_dtype_and_settings():
    model = tiny_llama(dtype=torch.bfloat16, attn="eager", rms_norm_eps=1e-3)
    model.generation_config.temperature = 0.5
    searched(model)
    pruned = prune(model, inputs=token_batch())
    assert pruned.dtype == torch.bfloat16
    assert pruned.config._attn_implementation == "eager"
    assert pruned.config.rms_norm_eps == 1e-3
    assert pruned.generation_config.temperature == 0.5


def test_parameters_of_a_cut_have_the_models_dtype_and_buffers_their_own():
    model = tiny(ResNetForImageClassification).to(torch.bfloat16)
    model.classifier[-1].float()  # mixed precision may leave a head in float32
    searched(model)
    plan, bound = plan_of(model), gates_of(model).attachment.bound
    detach_(model)
    pruned = cut(model, bound, plan, "uniform")
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    before, after = ({name: buffer.dtype for name, buffer in each.named_buffers()} for each in (model, pruned))
    assert set(after.values()) == {torch.bfloat16, torch.int64}
    assert after.items() <= before.items()


def test_a_tied_parameter_has_its_source_under_each_of_its_names():
    model = tiny_llama(tie_word_embeddings=True)
    searched(model)
    plan, bound = plan_of(model), gates_of(model).attachment.bound
    detach_(model)
    names = source_names(cut(model, bound, plan, "uniform"), bound, plan)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(names)


def test_target_one_keeps_the_model():
    model = tiny_llama()
    attach_(model, DMSConfig(target=1.0))
    search_(model)
    with torch.no_grad():
        gates_of(model).prune_ratio.zero_()
    pruned = prune(model, inputs=token_batch())
    detach_(model)
    assert all(torch.equal(tensor, pruned.state_dict()[name]) for name, tensor in model.state_dict().items())


# ---- without a search ----
def test_prune_without_a_search_warns_keeps_the_budget_and_takes_the_gates_off_again():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="no search has run .* weight magnitude"):
        pruned = prune(model, DMSConfig(target=0.6), inputs=token_batch())
    assert pruned.num_parameters() <= 0.6 * model.num_parameters()
    assert not hasattr(model, "dms_gates")


def test_prune_without_a_search_leaves_gates_put_on_before_as_they_were():
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.6))
    with pytest.warns(UserWarning, match="no search has run"):
        prune(model, inputs=token_batch())
    gates = gates_of(model)
    assert not any(gates.raw_importance(name).any() for name in gates.dims)
    assert gates.prune_ratio.abs().max() == 0


def test_prune_without_a_search_keeps_the_largest_weights():
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, [1, 4]] *= 100
        model.model.layers[0].mlp.down_proj.weight[:, [0, 2, 3, *range(5, 20)]] *= 0.01
    with pytest.warns(UserWarning, match="no search"):
        pruned = prune(model, DMSConfig(target=0.75, prune=("mlp",)), inputs=token_batch())
    kept = pruned.config.intermediate_size
    assert 2 <= kept < 20
    columns = model.model.layers[0].mlp.down_proj.weight[:, [1, 4]]
    found = pruned.model.layers[0].mlp.down_proj.weight
    assert all(any(torch.equal(column, other) for other in found.T) for column in columns.T)


@pytest.mark.filterwarnings("ignore:prune. no search has run")
@pytest.mark.parametrize("is_searched", [True, False])
def test_plan_of_is_what_prune_cuts_by(is_searched):
    model = tiny_llama()
    if is_searched:
        searched(model)
    else:
        attach_(model, DMSConfig(target=0.7))
    gates = gates_of(model)
    before = {name: gates.raw_importance(name).clone() for name in gates.dims}
    plan = plan_of(model)
    assert all(torch.equal(gates.raw_importance(name), importance) for name, importance in before.items())
    assert same_tensors(prune(model), cut(model, gates.attachment.bound, plan, "uniform"))
    detach_(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no gates\. Put them on"):
        plan_of(model)


def test_magnitude_importance_is_the_sum_of_squares_of_all_weights_of_a_unit():
    model = tiny_llama(attention_bias=True)
    attach_(model, DMSConfig(target=0.5, layout="per_layer"))
    gates = gates_of(model)
    importance = magnitude_importance(gates.attachment.bound, model, gates)
    model.requires_grad_(False)
    layer, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    ups = mlp.gate_proj.weight[5].square().sum() + mlp.up_proj.weight[5].square().sum()
    assert importance["mlp"][1, 5] == pytest.approx(float(ups + mlp.down_proj.weight[:, 5].square().sum()))
    group = sum(float(p.square().sum()) for p in (layer.q_proj.weight[8:16], layer.q_proj.bias[8:16]))
    group += sum(float(m.weight[4:8].square().sum() + m.bias[4:8].square().sum()) for m in (layer.k_proj, layer.v_proj))
    assert importance["kv"][1, 1] == pytest.approx(group + float(layer.o_proj.weight[:, 8:16].square().sum()))
    total = sum(float(p.square().sum()) for p in model.model.layers[1].parameters())
    assert importance["layers"][0, 1] == pytest.approx(total)


def test_prune_without_gates_and_config_is_an_error():
    with pytest.raises(ValueError, match=r"prune needs a model with gates .* or a dms_config"):
        prune(tiny_llama())


def test_a_model_pruned_per_layer_cannot_be_pruned_again():
    model = tiny_llama()
    searched(model, layout="per_layer")
    pruned = prune(model, inputs=token_batch())
    with pytest.raises(
        ValueError, match=r"'dms_llama' was pruned by hf_dms before, .* or prune in several rounds with layout: uniform"
    ):
        prune(pruned, DMSConfig(target=0.5))


def test_a_model_pruned_uniformly_can_be_pruned_again():
    model = tiny_llama()
    searched(model, layout="uniform")
    pruned = prune(model, inputs=token_batch())
    with pytest.warns(UserWarning, match="no search"):
        again = prune(pruned, DMSConfig(target=0.5), inputs=token_batch())
    assert again.num_parameters() <= 0.5 * pruned.num_parameters()


# ---- what a stock config can express ----
def kv_only(kept, head=LlamaForCausalLM, **overrides):
    """A model pruned to `kept` of its 6 KV heads, hidden 24 untouched: 4 heads divide 24, 5 do not."""
    model = tiny_llama(head, num_key_value_heads=6, **overrides)
    attach_(model, DMSConfig(target=1.0, prune=("kv",)))
    search_(model)
    gates = gates_of(model)
    sizes = {"kv": torch.full((3,), kept)}
    bound = gates.attachment.bound
    pruned = cut(model, bound, make_plan(gates, sizes), "uniform")
    with hard_masked(model, sizes):
        check_same(model, pruned, token_batch(), ("masked", "cut"))
    return pruned


def test_kv_alone_gives_a_llama_where_the_heads_divide_hidden():
    assert kv_only(4).config.model_type == "llama"


def test_kv_alone_gives_a_mistral_where_the_heads_do_not_divide_hidden(tmp_path):
    pruned = kv_only(5)
    assert pruned.config.model_type == "mistral"
    assert pruned.config.sliding_window is None
    save_pruned(pruned, tmp_path / "out", inputs=token_batch())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(reloaded) is transformers.MistralForCausalLM
    assert relative_difference(outputs_of(reloaded, token_batch()), outputs_of(pruned, token_batch())) < SHIPPED


@pytest.mark.parametrize("head", HEADS)
def test_every_head_can_be_written_as_a_mistral(head):
    pruned = kv_only(5, head)
    assert type(pruned).__name__ == head.__name__.replace("Llama", "Mistral")


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_model_with_biases_is_never_written_as_a_mistral(bias):
    with pytest.raises(ValueError, match=r"LlamaConfig cannot express the sizes .* Use layout: per_layer"):
        kv_only(5, **{bias: True})
    assert kv_only(4, **{bias: True}).config.model_type == "llama"


# ---- pieces ----
def test_axis_indices_of_a_product_are_those_of_a_reshape():
    model = tiny_llama()
    gates, sizes = searched(model, layout="per_layer")
    bound, plan = gates.attachment.bound, make_plan(gates, sizes)
    positions = torch.arange(24).view(3, 2, 4)
    for layer in range(3):
        expected = positions[plan.kept["kv"][layer]].flatten()
        assert torch.equal(axis_indices(("kv", "rep", "d"), bound, layer, plan), expected)


def test_the_public_names_are_those_of_the_modules():
    assert hf_dms.prune is prune
    assert hf_dms.attach_ is attach_
    assert hf_dms.save_pruned is save_pruned


def test_importance_that_is_zero_everywhere_in_a_dim_is_refused():
    """Ties break by index: without the error, the first units of the dim would be cut silently."""
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.6))
    search_(model)
    gates_of(model).raw_importance("mlp").zero_()
    with pytest.raises(ValueError, match=r"prune: after 8 updates every unit of mlp has importance 0"):
        prune(model, inputs=token_batch())


@pytest.mark.parametrize("last", ["uniform", "per_layer"])
def test_a_uniform_result_is_searched_and_pruned_again(last):
    model, sizes = tiny_llama(num_hidden_layers=4), []
    for layout in ("uniform", "uniform", last):
        attach_(model, DMSConfig(target=0.85, layout=layout))
        search_(model, seed=len(sizes))
        sizes.append(model.num_parameters() - gates_of(model).prune_ratio.numel())
        model = prune(model, inputs=token_batch())
        assert 0.5 * sizes[-1] < model.num_parameters() <= 0.85 * sizes[-1]
