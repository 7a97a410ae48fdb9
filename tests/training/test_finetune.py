"""Ordinary training, with and without a teacher; a finished run is not trained further."""

import copy
import json

import pytest
import torch
from helpers.laws import tiny
from helpers.searches import Images, Poisoned, arguments, bit_equal, logged, stories, weights
from helpers.tiny import Tokens, tiny_llama, token_batch
from torch.nn import functional as F
from transformers import BertForMaskedLM, ViTForImageClassification, default_data_collator

from hf_dms.errors import NonFiniteError
from hf_dms.tasks.task import Examples
from hf_dms.training import taught
from hf_dms.training.distillation import DistillationConfig
from hf_dms.training.finetune import DistillationTrainer, distillation_loss, train_


def examples(data=None):
    data = Tokens() if data is None else data
    return Examples(data, data, default_data_collator, (), "examples")


# ---- the loss ----
def test_equal_logits_have_nothing_to_learn():
    logits = torch.randn(3, 5, 7)
    assert distillation_loss(logits, logits, 2.0) == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_divergence_of_the_softened_distributions():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    p, q = F.softmax(teacher / 3, -1), F.softmax(student / 3, -1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(float(expected), rel=1e-5)


def test_predictions_without_a_label_do_not_count():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, -100], [-100, -100, -100]])
    expected = distillation_loss(student[:1, 0], teacher[:1, 0], 2.0)
    assert torch.allclose(distillation_loss(student, teacher, 2.0, labels), expected)


def test_predictions_of_the_next_label_count_where_that_one_does():
    """After a prompt of two tokens, the prediction at its last token belongs to the first label that counts."""
    student, teacher = torch.randn(1, 5, 7), torch.randn(1, 5, 7)
    labels = torch.tensor([[-100, -100, 4, 2, -100]])
    expected = distillation_loss(student[:, 1:3], teacher[:, 1:3], 2.0)
    assert torch.allclose(distillation_loss(student, teacher, 2.0, labels, shifted=True), expected)


def test_a_batch_without_labels_teaches_nothing():
    student = torch.randn(1, 3, 5, requires_grad=True)
    for shifted in (False, True):
        loss = distillation_loss(student, torch.randn(1, 3, 5), 2.0, torch.full((1, 3), -100), shifted)
        loss.backward()
        assert loss == 0
        assert student.grad.abs().sum() == 0


# ---- the training ----
def bert(seed=0):
    return tiny(BertForMaskedLM, seed, hidden_dropout_prob=0, attention_probs_dropout_prob=0)


@pytest.mark.parametrize(("make", "shifted"), [(tiny_llama, True), (bert, False)], ids=["llama", "bert"])
def test_a_teacher_is_heard_where_the_model_predicts_labels(make, shifted, tmp_path):
    """If the teacher has the whole weight, the loss is the divergence at the predictions that have labels."""
    student, teacher = make(), make(seed=1)
    ids = token_batch(2, 6)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt
    trainer = DistillationTrainer(
        model=student, args=arguments(tmp_path), train_dataset=Tokens(), teacher=teacher,
        distillation=DistillationConfig(1.0), max_nonfinite_steps=3,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    found = trainer.compute_loss(student.train(), {"input_ids": ids, "labels": labels})
    positions = slice(2, 5) if shifted else slice(3, 6)
    logits = [model.eval()(input_ids=ids).logits[:, positions].detach() for model in (student, teacher)]
    assert float(found.detach()) == pytest.approx(float(distillation_loss(*logits, 2.0)), rel=1e-5)


def test_a_teacher_alone_is_approached(tmp_path):
    teacher, student = tiny_llama(), tiny_llama(seed=1)
    before, ids = copy.deepcopy(student), Tokens()[0]["input_ids"][None]
    train_(student, arguments(tmp_path, max_steps=20, learning_rate=1e-2), examples(), teacher, DistillationConfig(1.0))
    with torch.no_grad():
        target = teacher(ids).logits
        first, last = (distillation_loss(model(ids).logits, target, 2.0) for model in (before, student))
    assert last < 0.5 * first
    assert not student.training


def test_a_teacher_counts_the_same_in_micro_batches(tmp_path):
    teacher, found = tiny_llama(), []
    for size in (8, 4):
        student = tiny_llama(seed=1)
        args = arguments(
            tmp_path / str(size), optim="sgd", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        train_(student, args, examples(), teacher, DistillationConfig(0.5))
        found.append(weights(student))
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-6)


class Counting(ViTForImageClassification):
    """A teacher that counts the images it sees."""

    seen = 0

    def forward(self, pixel_values, **kwargs):
        self.seen += len(pixel_values)
        return super().forward(pixel_values, **kwargs)


@pytest.mark.parametrize(("most", "epochs", "times"), [(2**30, 3, 1), (0, 3, 3), (2**30, 1, 1)])
def test_a_classifier_s_teacher_sees_an_example_once_where_its_logits_can_be_kept(
    most, epochs, times, tmp_path, monkeypatch
):
    """The student is the same, but for the order of sums in another batch."""
    images = Images()
    options = {"num_train_epochs": epochs, "max_steps": -1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    found = []
    for limit in (most, 0):
        monkeypatch.setattr(taught, "MOST_BYTES", limit)
        teacher, student = Counting(tiny(ViTForImageClassification, 1).config), tiny(ViTForImageClassification)
        teacher.load_state_dict(tiny(ViTForImageClassification, 1).state_dict())
        folder = tmp_path / str(len(found))
        train_(student, arguments(folder, **options), examples(images), teacher, DistillationConfig(0.5))
        found.append((weights(student), teacher.seen))
    (kept, seen), (computed, _) = found
    beside = 4 if most == 0 and epochs > 1 else 0  # the first batch says how large the logits are
    assert seen == times * len(images) + beside
    assert all(torch.allclose(tensor, computed[name], atol=1e-4) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("make", "data"), [(tiny_llama, Tokens), (lambda: tiny(ViTForImageClassification), Images)], ids=["llama", "vit"]
)
def test_a_finished_run_is_loaded_and_not_trained_further(make, data, tmp_path):
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=5)  # not a whole number of epochs
    first, again = make(), make()
    train_(first, args, examples(data()))
    train_(again, args, examples(data()))
    assert bit_equal(weights(again), weights(first))


def test_the_cache_setting_survives_a_training(tmp_path):
    model = tiny_llama()
    train_(model, arguments(tmp_path, max_steps=1), examples())
    assert model.config.use_cache


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda seed: tiny_llama(seed=seed, attention_dropout=0.1), Tokens),
        (lambda seed: tiny(ViTForImageClassification, seed, hidden_dropout_prob=0.1), Images),
    ],
    ids=["llama", "vit, whose teacher's logits are kept"],
)
def test_a_training_resumes_bit_for_bit_with_its_log(make, data, tmp_path):
    """A checkpoint lies in the middle of an epoch, and between two logs."""
    found = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=4)
        model = make(1 if resume else 0)
        trainer = DistillationTrainer(
            model=model, args=args, train_dataset=data(), teacher=make(2),
            distillation=DistillationConfig(0.5), max_nonfinite_steps=3,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        found.append((weights(model), stories(trainer)))
        assert isinstance(trainer.train_dataset, taught.Taught) == (data is Images)
    assert bit_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# ---- losses and gradients that are not finite ----
def on_poisoned(folder, data, **options):
    args = arguments(folder, **options)
    model = tiny(ViTForImageClassification)
    return DistillationTrainer(model=model, args=args, train_dataset=data, max_nonfinite_steps=10)


def test_a_bad_step_of_a_training_changes_nothing_and_is_counted(tmp_path):
    trainer = on_poisoned(tmp_path, Poisoned([5]), max_steps=2, weight_decay=0.1, logging_nan_inf_filter=True)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.skipped_steps == logged(trainer, "skipped_steps")[-1] == 1
    after = weights(trainer.model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not bit_equal(before, after)
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_too_many_bad_steps_end_a_training_with_its_last_checkpoint_intact(tmp_path):
    args = arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=2)
    model, bad = tiny(ViTForImageClassification), Poisoned(range(16))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 3, had .* not finite \(loss nan"):
        train_(model, args, examples(bad), max_nonfinite_steps=3)
    saved = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert bit_equal(weights(saved), weights(tiny(ViTForImageClassification)))
