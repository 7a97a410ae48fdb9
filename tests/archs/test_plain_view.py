"""Searching beside adapters and on packed weights: masks lie outside adapters, and what is cut is the merged weight."""

import copy
import itertools

import pytest
import torch
from helpers.laws import TEXT
from helpers.marks import ordinary_if
from helpers.searches import bit_equal, trained, weights
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch, untouched
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_dms import DMSConfig, attach_, choose_, detach_, prune
from hf_dms.archs.plain_view import plain_parameters, plain_weight
from hf_dms.cut.prune import magnitude_importance, plan_of
from hf_dms.cut.verify import hard_masked, outputs_of
from hf_dms.gating.attach import gates_of

peft = pytest.importorskip("peft")
# peft 0.21 asks for it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = DMSConfig(target=0.6, layout="per_layer")
SOME = ["q_proj", "down_proj"]
METHODS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5),
    "rank-stabilised lora": lambda: peft.LoraConfig(r=2, target_modules=SOME, init_lora_weights=False, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True, init_lora_weights=False),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=SOME, init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "oft": lambda: peft.OFTConfig(target_modules=SOME, r=0, oft_block_size=4, init_weights=False),
}


def adapted(method="lora", model=None):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama() if model is None else model, METHODS[method]()).eval()


@pytest.mark.parametrize("method", METHODS)
def test_the_cut_of_an_adapted_model_is_the_cut_of_the_merged_one(method):
    model = adapted(method)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    before = weights(model)
    for each in (model, merged):
        attach_(each, CONFIG)
        search_(each)
    pruned, expected = prune(model), prune(merged)
    assert type(pruned) is type(expected)
    assert not any("lora" in name or "base_layer" in name for name in pruned.state_dict())
    assert relative_difference(outputs_of(pruned, token_batch()), outputs_of(expected, token_batch())) < 1e-5
    detach_(model)
    assert bit_equal(weights(model), before)


def test_masks_go_around_adapters_and_soft_ones_give_both_a_gradient():
    model = adapted()
    attach_(model, CONFIG)
    search_(model)
    plan = plan_of(model)
    pruned = prune(model)
    sizes = {name: torch.tensor(units) for name, units in plan.sizes.items()}
    with hard_masked(model.get_base_model(), sizes):
        assert relative_difference(outputs_of(model, token_batch()), outputs_of(pruned, token_batch())) < 1e-5
    model.train()
    model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    assert gates_of(model).prune_ratio.grad.abs().min() > 0
    assert model.get_base_model().model.layers[0].mlp.down_proj.lora_B["default"].weight.grad.abs().max() > 0
    assert model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.grad is None


def test_adapters_that_transformers_put_on_are_merged_too():
    model = tiny_llama()
    torch.manual_seed(0)
    model.add_adapter(METHODS["lora"]())
    attach_(model.eval(), CONFIG)
    search_(model)
    same = adapted(model=tiny_llama())
    attach_(same, CONFIG)
    search_(same)
    assert bit_equal(weights(prune(model)), weights(prune(same)))


def test_inactive_disabled_and_merged_adapters_are_taken_as_they_are():
    model = adapted()
    name, plain = "model.layers.0.mlp.down_proj.weight", tiny_llama().model.layers[0].mlp.down_proj.weight
    inner = model.get_base_model()
    changed = plain_weight(inner, name)
    assert not torch.equal(changed, plain)
    with model.disable_adapter():
        assert torch.equal(plain_weight(inner, name), plain)
    model.merge_adapter()
    torch.testing.assert_close(plain_weight(inner, name), changed)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaForSequenceClassification, None),
        (BertForSequenceClassification, BertConfig(**TEXT)),
        (RobertaForSequenceClassification, RobertaConfig(**TEXT)),  # whose head is a module of several
    ],
)
def test_a_head_that_trains_whole_beside_adapters_is_cut_as_trained(cls, config):
    torch.manual_seed(0)
    model = tiny_llama(cls) if config is None else cls._from_config(config)
    plain = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    assert {name: shape for name, _, shape in plain_parameters(model.get_base_model())} == plain
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    attach_(model, DMSConfig(target=0.7, layout="per_layer", resource_scope="layers"))
    search_(model)
    pruned = prune(model)  # proves that it computes what the masked one does
    head = "score" if config is None else "classifier"
    assert not any("modules_to_save" in name for name in pruned.state_dict())
    trained_head = dict(model.get_base_model().named_modules())[head].modules_to_save["default"]
    assert sum(p.sum() for p in trained_head.parameters()) > 1  # not the one it began with
    detach_(model)
    assert not any("dms" in name for name, _ in model.named_parameters())


def test_magnitudes_are_those_of_the_merged_weights():
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    found = {}
    for each in (model, merged):
        attach_(each, CONFIG)
        gates, inner = gates_of(each), each.get_base_model() if each is model else each
        found[each is model] = magnitude_importance(gates.attachment.bound, inner, gates)
    for name, values in found[False].items():
        torch.testing.assert_close(found[True][name], values)


# ---- a search ----
def test_a_search_trains_adapters_and_ratios_alone_resumes_exactly_and_ends_plain(tmp_path):
    def started():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules="all-linear"))

    whole = trained(tmp_path / "whole", model=started(), save_steps=3, save_strategy="steps")
    frozen = [name for name, parameter in whole.model.named_parameters() if not parameter.requires_grad]
    base = dict(tiny_llama().named_parameters())
    inner = whole.model.get_base_model()
    assert len(frozen) == len(base)
    for name, parameter, _ in plain_parameters(inner):
        assert torch.equal(parameter, base[name])
    assert inner.model.layers[0].mlp.down_proj.lora_B["default"].weight.abs().max() > 0
    adapters = [p for name, p in whole.model.named_parameters() if p.requires_grad and "dms_gates" not in name]
    assert len(whole.optimizer.state_dict()["state"]) == len(adapters)
    assert len(whole.gate_optimizer.state_dict()["state"]) == 1
    resumed = trained(tmp_path / "resumed", model=started(), resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert bit_equal(weights(resumed.prune()), weights(whole.prune()))
    assert torch.equal(resumed.gates.prune_ratio, whole.gates.prune_ratio)


def packed_llama(folder, bits):
    pytest.importorskip("bitsandbytes")
    sizes = dict(hidden_size=64, intermediate_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
    tiny_llama(**sizes).save_pretrained(folder)
    packing = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packing, device_map="cpu", dtype=torch.float32
    )


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, about CPUs
@pytest.mark.parametrize(
    ("bits", "adapters"),
    ordinary_if(lambda bits, adapters: (bits == 4) == adapters, itertools.product([4, 8], [False, True])),
)
def test_a_search_on_packed_weights_resumes_exactly_and_ends_unpacked(bits, adapters, tmp_path):
    def started():
        model = packed_llama(tmp_path / "dense", bits)
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")) if adapters else model

    options = {"pipeline": "p" if adapters else "p-", "prune": ("kv", "mlp", "layers")}
    whole = trained(tmp_path / "whole", options, model=started(), save_steps=3, save_strategy="steps")
    pruned = whole.prune()
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.float32}
    assert getattr(pruned.config, "quantization_config", None) is None
    assert whole.gates.prune_ratio.max() > 0
    resumed = trained(tmp_path / "resumed", options, model=started(), resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert bit_equal(weights(resumed.prune()), weights(pruned))


# ---- what is refused ----
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapters_that_no_weight_can_hold_are_refused():
    prompt = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    untouched(prompt, "PROMPT_TUNING learns a prompt, which cannot be merged into weights")
    norms = peft.get_peft_model(tiny_llama(), peft.LNTuningConfig(target_modules=["input_layernorm"]))
    untouched(norms, r"input_layernorm' is a ln_tuning\S+LNTuningLayer on a LlamaRMSNorm. Adapters of linear maps")
    tokens = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=SOME, trainable_token_indices=[1]))
    untouched(tokens, "is a TrainableTokensWrapper of PEFT, which the cut cannot follow")


def test_adapters_of_tied_weights_are_refused():
    tied = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tied"):
        model = peft.get_peft_model(tied, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    untouched(model, r"model.embed_tokens.weight and lm_head.weight are one tensor, and merging would")


@pytest.mark.filterwarnings("ignore")
def test_dora_on_packed_weights_is_refused(tmp_path):
    model = packed_llama(tmp_path, 4)
    untouched(peft.get_peft_model(model, METHODS["dora"]()), r"on packed weights, which takes plain LoRA")


def test_adapters_put_on_after_the_gates_are_refused_by_the_cut():
    model = tiny_llama()
    attach_(model, CONFIG)
    search_(model)
    model = adapted(model=model)
    with pytest.raises(ValueError, match=r"o_proj' was adapted after attach_.* attach them again before the search"):
        prune(model)


def test_one_shot_choices_want_plain_weights():
    adapted = peft.get_peft_model(tiny_llama(), METHODS["lora"]())
    attach_(adapted, CONFIG)
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"choose_ scores plain weights, .* adapters or packed weights\. Merge"):
            choose_(model, "magnitude")
