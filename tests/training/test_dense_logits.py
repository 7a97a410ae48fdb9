"""The dense model as teacher of its own search: its outputs, and searches with them."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for
from helpers.searches import Classified, Images, arguments, bit_equal, dms, logged, trained
from helpers.tiny import Tokens, relative_difference, search_, tiny_llama, token_batch
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from hf_dms import DMSConfig, DMSTrainer, attach_
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import freeze_, gates_of, has_gates
from hf_dms.training.dense_logits import outputs_with_open_masks

KL = dict(pipeline="p-", kl_weight=1.0)


def in_search(cls, folder, data=None, **options):
    """A trainer in the middle of a search."""
    trainer = DMSTrainer(
        model=tiny(cls), dms_config=dms(**(KL | options)), args=arguments(folder), train_dataset=data or Tokens()
    )
    search_(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@torch.no_grad()
def divergence(student, dense):
    """KL(dense ‖ student), mean over predictions."""
    p, q = F.softmax(dense, -1), F.softmax(student, -1)
    return float((p * (p / q).log()).sum(-1).mean())


# ---- what the dense model says ----
@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForSequenceClassification, ViTForImageClassification])
def test_open_masks_give_the_logits_of_the_dense_model(cls, tmp_path):
    trainer = in_search(cls, tmp_path)
    model, batch = trainer.model, batches_for(trainer.model)[0]
    modes = [module.training for module in model.modules()]
    found = outputs_with_open_masks(model, model, batch).logits
    assert relative_difference(found, outputs_of(tiny(cls), batch)) < 1e-5
    assert not found.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert relative_difference(found, model(**batch).logits) > 1e-2  # the searched model has other outputs


def test_batch_norms_that_the_search_has_moved_are_those_of_the_dense_model():
    model = tiny(ResNetForImageClassification)
    attach_(model, DMSConfig(target=0.6, pipeline="p-"))
    freeze_(model)
    search_(model)
    batch = batches_for(model)[0]
    model.train()
    for _ in range(3):
        model(**batch)
    moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = outputs_with_open_masks(model, model, batch).logits
    assert relative_difference(found, outputs_of(tiny(ResNetForImageClassification), batch)) < 1e-5
    assert bit_equal(dict(model.named_buffers()), moved)


# ---- the loss ----
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_the_share_of_the_divergence_and_the_rest_of_the_task(weight, tmp_path):
    trainer = in_search(LlamaForCausalLM, tmp_path, kl_weight=weight, resource_weight=0.0)
    model, ids = trainer.model, token_batch(2, 6)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels}).detach()
    searched = model(input_ids=ids, labels=labels)
    dense = outputs_of(tiny(LlamaForCausalLM), {"input_ids": ids})
    expected = divergence(searched.logits[:, 2:5], dense[:, 2:5])
    assert expected > 1e-3
    assert float(found) == pytest.approx(weight * expected + (1 - weight) * float(searched.loss.detach()), rel=1e-5)


def test_a_classifier_s_divergence_is_that_of_its_classes(tmp_path):
    trainer = in_search(BertForSequenceClassification, tmp_path, Classified(), resource_weight=0.0)
    batch = batches_for(trainer.model)[0]
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    found = trainer.compute_loss(trainer.model, batch | {"labels": labels}).detach()
    dense = outputs_of(tiny(BertForSequenceClassification), batch)
    assert float(found) == pytest.approx(divergence(trainer.model(**batch).logits, dense), rel=1e-4)


def test_the_gradient_of_a_ratio_is_that_of_the_divergence(tmp_path):
    trainer = in_search(LlamaForCausalLM, tmp_path, resource_weight=0.0)
    batch = {"input_ids": (ids := token_batch(2, 6)["input_ids"]), "labels": ids}
    ratio = trainer.gates.prune_ratio
    ratio.data.fill_(0.3)
    trainer.compute_loss(trainer.model, batch).backward()
    step, moved = 1e-3, []
    place = int(ratio.grad.abs().argmax())
    for sign in (1, -1):
        with torch.no_grad():
            ratio[place] += sign * step
            moved.append(float(trainer.compute_loss(trainer.model, batch)))
            ratio[place] -= sign * step
    assert abs(float(ratio.grad[place])) > 1e-3
    assert float(ratio.grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.05)


# ---- the search ----
def test_the_warm_up_is_that_of_the_task_and_evaluations_are_too(tmp_path):
    """The divergence is 0 at open masks, so it would make no unit more important than another."""
    options = dict(max_steps=3, eval_strategy="steps", eval_steps=1)
    plain, found = (trained(tmp_path / str(w), dict(KL, kl_weight=w), **options) for w in (0.0, 1.0))
    assert logged(found, "task_loss")[:2] == logged(plain, "task_loss")[:2]
    assert logged(found, "task_loss")[2] < 0.1 * logged(plain, "task_loss")[2]
    assert logged(found, "eval_loss")[:2] == logged(plain, "eval_loss")[:2]
    examples = Tokens(8, seed=1)[:]
    assert logged(found, "eval_loss")[2] == pytest.approx(float(found.model.eval()(**examples).loss.detach()))


@pytest.mark.parametrize("options", [{}, dict(gradient_accumulation_steps=2, per_device_train_batch_size=4)])
def test_a_search_by_divergence_resumes_exactly(options, tmp_path):
    steps = dict(save_strategy="steps", save_steps=3, **options)
    whole = trained(tmp_path, KL, **steps)
    again = trained(tmp_path, KL, resume=str(tmp_path / "checkpoint-3"), **steps)
    assert bit_equal(again.gates.search_state(), whole.gates.search_state())
    assert logged(again, "task_loss") == logged(whole, "task_loss")
    assert bit_equal(whole.model.state_dict(), tiny_llama().state_dict())


def test_the_divergence_counts_the_same_in_micro_batches(tmp_path):
    for weight in (1.0, 0.5):
        options = dict(KL, kl_weight=weight)
        whole = trained(tmp_path / "8", options)
        parts = trained(tmp_path / "4", options, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        assert logged(parts, "task_loss") == pytest.approx(logged(whole, "task_loss"), rel=1e-4)
        assert torch.allclose(parts.gates.prune_ratio, whole.gates.prune_ratio, atol=1e-4)


def test_recomputed_activations_search_alike(tmp_path):
    plain, found = (trained(tmp_path / str(on), KL, activation_checkpointing=on) for on in (False, True))
    assert logged(found, "task_loss") == pytest.approx(logged(plain, "task_loss"), rel=1e-5)
    assert torch.allclose(found.gates.prune_ratio, plain.gates.prune_ratio, atol=1e-5)


def test_in_autocast_both_passes_are_in_half_precision(tmp_path):
    trainer = trained(tmp_path, KL, bf16=True)
    assert 0 <= logged(trainer, "task_loss")[2] < 0.1  # masks are nearly open, and both passes have the same precision
    assert trainer.prune().num_parameters() < tiny_llama().num_parameters()


@pytest.mark.parametrize(
    ("cls", "data"), [(BertForSequenceClassification, Classified), (ViTForImageClassification, Images)]
)
def test_classifiers_are_searched_by_divergence(cls, data, tmp_path):
    trainer = DMSTrainer(model=tiny(cls), dms_config=dms(**KL), args=arguments(tmp_path), train_dataset=data())
    trainer.train()
    assert all(0 < loss < 1 for loss in logged(trainer, "task_loss")[3:])
    assert float(trainer.gates.prune_ratio.detach().max()) > 0.02


def test_over_refitted_weights_the_dense_model_is_still_the_dense_one(tmp_path):
    config = dict(KL, prune=("kv", "mlp"), search_over="refitted", warmup_steps=0)
    trainer = trained(tmp_path, config)
    gates, batch = gates_of(trainer.model), token_batch(2, 6)
    assert gates.refitted == {"kv", "mlp"}
    trainer.model.train()
    found = outputs_with_open_masks(trainer.model, trainer.model, batch).logits
    assert relative_difference(found, outputs_of(tiny_llama(), batch)) < 1e-5
    assert relative_difference(found, trainer.model(**batch).logits) > 1e-3
    losses = logged(trainer, "task_loss")
    assert losses[0] < 0.01 < losses[-1]


# ---- what is refused ----
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kl_weight=0.5), r"kl_weight = 0\.5 needs frozen weights, got pipeline p: .* recover\.distillation"),
        (dict(kl_weight=0.5, pipeline="np"), "needs frozen weights, got pipeline np"),
        (dict(kl_weight=1.5, pipeline="p-"), r"kl_weight must be in \[0, 1\], got 1\.5"),
        (dict(kl_weight="all", pipeline="p-"), "kl_weight must be a number, got 'all'"),
        (dict(KL, strategy="flap"), r"strategy = flap .* dms\.kl_weight = 1\.0 has no meaning"),
        (dict(KL, warmup_steps=0), r"kl_weight = 1 needs a warm-up, got dms\.warmup_steps = 0"),
    ],
)
def test_what_has_no_dense_model_to_compare_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DMSConfig(target=0.6, **options)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification", None])
def test_heads_without_a_distribution_are_refused(kind, tmp_path):
    model = tiny_llama(LlamaForSequenceClassification, num_labels=3 if kind else 1, problem_type=kind)
    with pytest.raises(ValueError, match=f"kl_weight needs a head .* problem_type {kind or 'regression'}"):
        DMSTrainer(model=model, dms_config=dms(**KL), args=arguments(tmp_path), train_dataset=Tokens())
    assert not has_gates(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_logits_is_named(tmp_path):
    model = tiny_llama(LlamaModel)
    trainer = DMSTrainer(model=model, dms_config=dms(**KL), args=arguments(tmp_path), train_dataset=Tokens())
    search_(model)
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(ValueError, match="needs a model that gives logits; this one gives last_hidden_state"):
        trainer.compute_loss(model.train(), token_batch())
