"""Llama's relatives obey the laws that it does: masked = cut = reloaded, counted = real, stock where the layout is."""

import itertools

import pytest
import torch
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
from helpers.marks import ordinary_if
from helpers.tiny import token_batch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
    GemmaForCausalLM,
    GraniteForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from hf_dms import DMSConfig, attach_, prune
from hf_dms.archs.registry import ARCHS
from hf_dms.cut.prune import make_plan
from hf_dms.gating.attach import gates_of
from hf_dms.gating.places import norms

HEADS = [
    *(head for name in ("Mistral", "Qwen2", "Qwen3", "SmolLM3") for head in heads_of(name, "CausalLM", *TASKS)),
    *heads_of("Granite", "CausalLM"),
    *(head for name in ("Gemma", "Gemma2") for head in heads_of(name, "CausalLM", *TASKS[:2])),
    *(Gemma3TextModel, Gemma3ForCausalLM, Gemma3TextForSequenceClassification),
]
GEMMAS = [head for head in HEADS if head.__name__.startswith("Gemma")]
CAUSAL = [head for head in HEADS if head.__name__.endswith("CausalLM")]


def prunable(head):
    return ARCHS[head.config_class.model_type].prunable


@pytest.fixture
def exact_norms(exact_norms, monkeypatch):
    """Those of the relatives too."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for norm in (Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm, GraniteRMSNorm):
        monkeypatch.setattr(norm, "forward", LlamaRMSNorm.forward)
    for norm in (GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm):
        monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1 + self.weight))


LAYOUTS = ("uniform", "per_layer")
DIMS = [(head, dims) for head in CAUSAL for dims in [*[(d,) for d in prunable(head)], prunable(head)]]


def all_or_every_second(head, dims, layout):
    """All dims in both layouts, and each alone in one of them."""
    return len(dims) > 1 or (CAUSAL.index(head) + prunable(head).index(*dims)) % 2 == LAYOUTS.index(layout)


@pytest.mark.parametrize(
    ("head", "dims", "layout"), ordinary_if(all_or_every_second, [(*each, lay) for each in DIMS for lay in LAYOUTS])
)
def test_masked_equals_cut_equals_reloaded(head, dims, layout, tmp_path, exact_norms):
    model = tiny(head, dtype=torch.float64)
    _, sizes = searched(model, prune=dims, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


@pytest.mark.parametrize(
    ("head", "layout"),
    ordinary_if(lambda head, layout: HEADS.index(head) % 2 == LAYOUTS.index(layout), itertools.product(HEADS, LAYOUTS)),
)
def test_masked_equals_cut_equals_reloaded_as_shipped(head, layout, tmp_path):
    model = tiny(head)
    _, sizes = searched(model, layout=layout)
    *outputs, _ = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)


@st.composite
def requests(draw):
    head, rep, kv = draw(st.sampled_from(HEADS)), draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    config = dict(
        num_key_value_heads=kv,
        num_attention_heads=kv * rep,
        hidden_size=36 if head in GEMMAS else kv * rep * draw(st.sampled_from([2, 4])),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
    )
    config |= draw(st.sampled_from([{}, {"head_dim": 2}, {"head_dim": 8}]))
    options = dict(
        prune=tuple(draw(st.lists(st.sampled_from(prunable(head)), min_size=1, unique=True))),
        layout=draw(st.sampled_from(["uniform", "per_layer", "padded"])),
        resource=draw(st.sampled_from(["params", "macs", "kv_bytes"])),
        resource_scope=draw(st.sampled_from(["model", "layers"])),
    )
    return head, config, options, draw(st.integers(0, 1000)), draw(st.floats(0, 1))


@given(requests())
def test_the_laws_hold_for_any_config(tmp_path_factory, exact_norms, request_):
    head, config, options, seed, share = request_
    model = tiny(head, seed, torch.float64, **config)
    gates, sizes = searched(model, seed, share, **options)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path_factory.mktemp("law") / "out")
    assert_same(*outputs, EXACT)
    assert options["layout"] == "per_layer" or is_stock(pruned)
    counted, scope = float(gates.count(gates.dense_sizes() | sizes)), options["resource_scope"]
    assert counted <= gates.attachment.config.target * gates.dense_resource
    written = float(gates.count(written_sizes(gates, sizes, pruned)))
    if options["resource"] == "params":
        whole = pruned.get_submodule(gates.attachment.bound.layers_path) if scope == "layers" else pruned
        assert written == sum(parameter.numel() for parameter in whole.parameters())
    elif options["resource"] == "macs":
        found = macs_by_the_flop_counter(pruned, scope, batch_for(pruned, batch=1), 7)
        assert written == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("head", CAUSAL)
def test_generate_with_a_cache_equals_that_without(head, layout, tmp_path):
    model = tiny(head)
    model.generation_config.eos_token_id = None  # always the full length
    searched(model, layout=layout)
    prune(model, inputs=token_batch()).save_pretrained(tmp_path)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = pruned.generate(**token_batch(), max_new_tokens=8, do_sample=False, use_cache=False)
    assert expected.shape == (2, 15)
    for cache in ("dynamic", "static"):
        options = dict(cache_implementation="static") if cache == "static" else {}
        assert torch.equal(pruned.generate(**token_batch(), max_new_tokens=8, do_sample=False, **options), expected)


def test_norms_over_the_head_size_are_left_alone():
    model = tiny(Qwen3ForCausalLM)
    searched(model)
    paths = list(norms(gates_of(model).attachment.bound, "hidden"))
    assert len(paths) == 2 * 3 + 1
    assert not any("q_norm" in path or "k_norm" in path for path in paths)


@pytest.mark.parametrize("head", [Qwen2ForCausalLM, SmolLM3ForCausalLM, GraniteForCausalLM, GemmaForCausalLM])
def test_a_stock_model_takes_heads_that_do_not_divide_its_hidden_size(head, tmp_path):
    model = tiny(head, num_attention_heads=6, num_key_value_heads=6, hidden_size=36)
    _, sizes = searched(model, prune=("kv",), protect={"min": {"kv": 5}, "max": {"kv": 5}})
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)
    head_dim = model.model.layers[0].self_attn.head_dim
    assert (pruned.config.num_attention_heads, pruned.config.hidden_size, pruned.config.head_dim) == (5, 36, head_dim)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is head


@pytest.mark.parametrize("head", [Gemma2ForCausalLM, Gemma3ForCausalLM])
def test_a_stock_gemma_whose_config_checks_its_heads_gets_such_that_divide_its_hidden_size(head):
    def kept(**protect):
        model = tiny(head, num_attention_heads=6, num_key_value_heads=6)
        _, sizes = searched(model, prune=("kv",), share=0.99, protect=protect)
        return int(sizes["kv"][0])

    assert kept() == kept(max={"kv": 5}) == 4
    with pytest.raises(ValueError, match=r"no allowed sizes make 1·kv a divisor of hidden, .* Use layout: per_layer"):
        kept(min={"kv": 5}, max={"kv": 5})


@pytest.mark.parametrize("head", GEMMAS)
def test_the_hidden_size_of_a_gemma_is_not_pruned(head):
    with pytest.raises(ValueError, match=r"dms.prune: gemma\w* has no dim 'hidden'. Its dims are kv, mlp, layers."):
        attach_(tiny(head), DMSConfig(target=0.9, prune=("hidden",)))


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_layers_without_rotary_positions_stay_so(layout):
    model = tiny(SmolLM3ForCausalLM)
    gates, sizes = searched(model, prune=("mlp", "layers"), protect={"max": {"layers": 2}}, layout=layout)
    for dropped in range(3):
        gates.raw_importance("layers").copy_(torch.arange(3)[None] != dropped)
        pruned = prune(model, inputs=token_batch())
        kept = make_plan(gates, sizes).kept["layers"][0].tolist()
        assert pruned.config.no_rope_layers == [[1, 0, 1][layer] for layer in kept]
