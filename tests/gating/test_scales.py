"""Scales of units are learned beside the prune ratios, and end up in the weights of the cut model."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for
from helpers.searches import bit_equal, dms, logged, trained, weights
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch, trace
from transformers import (
    BertForSequenceClassification,
    ConvNextForImageClassification,
    ConvNextV2ForImageClassification,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MobileViTForImageClassification,
    ResNetForImageClassification,
    SwinForImageClassification,
    ViTForImageClassification,
)

from hf_dms import DMSConfig, attach_, choose_, detach_, plan_of, prune
from hf_dms.archs.registry import spec_for
from hf_dms.cut.verify import hard_masked, open_gates, outputs_of
from hf_dms.errors import VerificationError
from hf_dms.gating.attach import copy_search_, gates_of

SCALES = dict(pipeline="p-", scales="norms")


def searched(model, **options):
    """A model with gates whose ratios and scales a search has moved."""
    attach_(model, DMSConfig(**({"target": 0.6} | SCALES | options)))
    search_(model)
    generator = torch.Generator().manual_seed(1)
    for scale in gates_of(model).scales.values():
        scale.normal_(0, 0.5, generator=generator)
    return model


# ---- the cut ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer", "padded"])
@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForSequenceClassification, ViTForImageClassification])
def test_masked_equals_cut(cls, layout):
    model = searched(
        tiny(cls).double(), layout=layout, **(dict(prune=("mlp",), target=0.8) if layout == "padded" else {})
    )
    batch = batches_for(model)[0]
    pruned = prune(model, inputs=batch)
    with hard_masked(model, {name: torch.tensor(size) for name, size in plan_of(model).sizes.items()}):
        masked = outputs_of(model, batch)
    assert relative_difference(outputs_of(pruned, batch), masked) < 1e-5  # RMS norms compute in float32
    gates = gates_of(model)
    gates.scales = {name: torch.zeros_like(scale) for name, scale in gates.scales.items()}
    assert relative_difference(outputs_of(prune(model), batch), masked) > 1e-3


@pytest.mark.parametrize(
    "cls",
    [
        *(ConvNextForImageClassification, ResNetForImageClassification),
        *(SwinForImageClassification, MobileViTForImageClassification),
    ],
)
def test_masked_equals_cut_in_stages(cls, monkeypatch):
    model = searched(tiny(cls), layout="per_layer" if spec_for(cls.config_class()).per_layer_only else "uniform")
    has_norms = any(name.startswith("norms.") for name in gates_of(model).scales)
    assert has_norms == (cls is not ResNetForImageClassification)
    prune(model, inputs=batches_for(model)[0])  # compares the outputs
    monkeypatch.setattr("hf_dms.cut.slicing.folded_scales", lambda log_scales, bound: {})
    with pytest.raises(VerificationError):
        prune(model, inputs=batches_for(model)[0])


def test_scales_are_of_units_that_maps_alone_read_and_of_norms():
    assert set(gates_of(searched(tiny_llama())).scales) == {"kv", "mlp", "norms.hidden"}
    assert set(gates_of(searched(tiny_llama(), scales=True)).scales) == {"kv", "mlp"}
    model = searched(tiny(ConvNextV2ForImageClassification), prune=("mlp",), layout="per_layer")
    assert not {"mlp0", "mlp1", "mlp2"} & set(gates_of(model).scales)  # response norms average over them
    for dims in (("hidden",), ("layers",)):
        assert set(gates_of(searched(tiny_llama(), prune=dims, target=0.9)).scales) == {"norms.hidden"}
    assert set(gates_of(searched(tiny(Gemma2ForCausalLM))).scales) == {"kv", "mlp"}  # its norms multiply by 1 + weight
    model = tiny(ResNetForImageClassification)
    before = trace(model)
    with pytest.raises(ValueError, match=r"dms\.scales: units of layers.* can have no scales"):
        attach_(model, DMSConfig(target=0.9, prune=("layers",), **SCALES))
    assert trace(model) == before


@pytest.mark.parametrize("name", ["mlp", "norms.hidden"])
def test_the_gradient_of_a_scale_is_that_of_the_loss(name):
    model = searched(tiny_llama(), layout="per_layer", warmup_steps=0)
    model.train()
    gates, ids = gates_of(model), token_batch()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    gates.update_importance_()
    gradient = gates.scales[name].grad
    place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    search_(model)
    step, moved = 1e-2, []
    for sign in (1, -1):
        gates.scales[name][place] += sign * step
        with torch.no_grad():
            moved.append(float(model(input_ids=ids, labels=ids).loss))
        gates.scales[name][place] -= sign * step
    assert float(gradient[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.02)


def test_without_them_open_gates_are_the_dense_model_and_they_come_off_without_a_trace():
    model, batch = tiny_llama(), token_batch()
    before, dense = trace(model), outputs_of(model, batch)
    searched(model)
    with open_gates(model):
        assert relative_difference(outputs_of(model, batch), dense) < 1e-5
    assert gates_of(model).scales["mlp"].any()
    detach_(model)
    assert trace(model) == before


def test_a_copy_of_a_search_has_its_scales():
    model, other = searched(tiny_llama()), tiny_llama()
    copy_search_(model, other)
    assert bit_equal(gates_of(other).scales, gates_of(model).scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_in_half_precision_is_on_the_weights_as_they_are_rounded(dtype):
    model = searched(tiny_llama(dtype=dtype))
    before = weights(model)
    assert prune(model).dtype == dtype
    assert bit_equal(weights(model), before)
    assert all(scale.any() for scale in gates_of(model).scales.values())


# ---- in the ranking of units ----
def test_units_are_ranked_by_importance_times_scale_to_a_power():
    model = searched(tiny_llama(), layout="per_layer", scale_power=2.0)
    gates = gates_of(model)
    expected = gates.raw_importance("mlp") * gates.scales["mlp"].exp().square()
    assert torch.allclose(gates.importance("mlp"), expected)
    assert torch.equal(gates.importance("hidden"), gates.raw_importance("hidden"))  # its norms have scales, it has none
    by_scales = plan_of(model).kept["mlp"]
    for units, row in zip(by_scales, expected):
        assert set(units.tolist()) == set(row.topk(len(units)).indices.tolist())
    pruned = prune(model, inputs=token_batch())  # compares the outputs
    assert pruned.num_parameters() < tiny_llama().num_parameters()
    gates.scales["mlp"].neg_()  # the cached whole sizes and units are not those of other scales
    assert not all(map(torch.equal, plan_of(model).kept["mlp"], by_scales))


def test_a_choice_ranks_by_its_scores_alone():
    model = searched(tiny_llama(), layout="per_layer", prune=("mlp",), target=0.8, scale_power=8.0)
    choose_(model, "pas", [token_batch() | {"labels": token_batch()["input_ids"]}] * 2)
    gates = gates_of(model)
    assert torch.equal(gates.importance("mlp"), gates.raw_importance("mlp"))
    other = tiny_llama()
    copy_search_(model, other)
    assert torch.equal(gates_of(other).importance("mlp"), gates.importance("mlp"))


# ---- the search ----
def test_a_search_ranks_by_its_scales_and_resumes_exactly(tmp_path):
    steps, options = dict(save_strategy="steps", save_steps=3), SCALES | {"scale_power": 8.0}
    whole = trained(tmp_path, options, **steps)
    again = trained(tmp_path, options, resume=str(tmp_path / "checkpoint-3"), **steps)
    assert bit_equal(again.gates.search_state(), whole.gates.search_state())
    plain = trained(tmp_path / "plain", SCALES)
    assert not bit_equal(whole.gates.search_state(), plain.gates.search_state())


def test_a_search_moves_them_after_its_warm_up_and_resumes_exactly(tmp_path):
    steps = dict(save_strategy="steps", save_steps=3)
    begun = trained(tmp_path / "warm", SCALES, max_steps=3)
    whole = trained(tmp_path, SCALES, **steps)
    scales = whole.gates.scales
    assert max(float(scale.abs().max()) for scale in begun.gates.scales.values()) <= 0.02 + 1e-6  # one step of Adam
    assert all(0.02 < float(scale.abs().max()) < 4 * 0.02 for scale in scales.values())
    again = trained(tmp_path, SCALES, resume=str(tmp_path / "checkpoint-3"), **steps)
    assert bit_equal(again.gates.search_state(), whole.gates.search_state())
    plain = trained(tmp_path / "plain", dict(pipeline="p-"))
    assert logged(whole, "task_loss")[:3] == logged(plain, "task_loss")[:3]
    assert logged(whole, "task_loss")[-1] < logged(plain, "task_loss")[-1]
    assert bit_equal(whole.model.state_dict(), tiny_llama().state_dict())
    assert not bit_equal(whole.prune().state_dict(), plain.prune().state_dict())


def test_in_an_own_loop_the_optimizer_that_gets_them_moves_them():
    model = searched(tiny_llama().requires_grad_(False))
    gates = gates_of(model)
    start = {name: scale.clone() for name, scale in gates.scales.items()}
    optimizer = torch.optim.Adam([{"params": gates.scales.values(), "lr": 0.01, "weight_decay": 0.0}])
    batch = token_batch()
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    gates.update_importance_()
    optimizer.step()
    assert all((scale != start[name]).any() for name, scale in gates.scales.items())


# ---- what is refused ----
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scales=True), "scales needs frozen weights, got pipeline p,"),
        (dict(SCALES, search_over="refitted"), "scales needs search_over = masks, got refitted"),
        (dict(SCALES, scales="yes"), "scales must be true, false or norms, got 'yes'"),
        (dict(pipeline="p-", scale_power=4.0), "scale_power = 4.0 needs scales, which dms.scales turns on"),
        (dict(SCALES, scale_power=64), r"scale_power must be in \[0, 32\], got 64"),
        (dict(SCALES, scale_power=4.0, strategy="pas"), "dms.scale_power = 4.0 has no meaning"),
    ],
)
def test_what_has_no_use_for_scales_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dms(**options)
