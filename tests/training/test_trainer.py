"""The search as a Trainer: what it adds to a Trainer, and what it must not change."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.laws import tiny
from helpers.marks import ordinary_if
from helpers.searches import (
    Classified,
    Images,
    Poisoned,
    arguments,
    bit_equal,
    dms,
    keep_open_,
    logged,
    stories,
    trained,
    weights,
)
from helpers.tiny import Tokens, relative_difference, search_, tiny_llama, token_batch
from safetensors import safe_open
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_dms import DMSConfig, DMSTrainer, attach_, detach_
from hf_dms.checkpoint.search_state import load_search_state_
from hf_dms.cut.verify import outputs_of
from hf_dms.errors import NonFiniteError
from hf_dms.gating.attach import frozen_mode_, gates_of
from hf_dms.gating.outcome import _message
from hf_dms.training.exact_resume import train_or_resume_
from hf_dms.training.trainer import check_training_arguments


# ---- what it must not change ----
@pytest.mark.parametrize("accumulation", [1, 2])
def test_open_masks_without_resource_loss_train_like_the_plain_trainer(accumulation, tmp_path):
    options = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation)
    plain = Trainer(model=tiny_llama(), args=arguments(tmp_path / "plain", **options), train_dataset=Tokens())
    plain.train()
    open_ = DMSTrainer(
        model=tiny_llama(), args=arguments(tmp_path / "open", **options), train_dataset=Tokens(),
        dms_config=dms(resource_weight=0.0),
    )  # fmt: skip
    keep_open_(open_)
    open_.train()
    assert len(logged(plain, "loss")) == 6
    assert logged(open_, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(open_, "task_loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(open_, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    for name, tensor in plain.model.state_dict().items():
        assert torch.allclose(open_.model.state_dict()[name], tensor, atol=1e-4)


def test_accumulating_micro_batches_equals_the_big_batch(tmp_path):
    # SGD: Adam's first steps are signs, which turn a rounding error of a small gradient into a whole step.
    options = dict(optim="sgd", max_steps=5)
    whole = trained(tmp_path / "1", **options, per_device_train_batch_size=8)
    for size in (4, 2):
        parts = trained(
            tmp_path / str(size), **options, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        assert logged(parts, "task_loss") == pytest.approx(logged(whole, "task_loss"), rel=1e-4)
        assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
        assert torch.allclose(parts.gates.prune_ratio, whole.gates.prune_ratio, atol=1e-5)
        for name in whole.gates.dims:
            found, expected = parts.gates.raw_importance(name), whole.gates.raw_importance(name)
            assert torch.allclose(found, expected, rtol=1e-2, atol=1e-4 * float(expected.max()))
    assert whole.gates.num_updates == 5
    assert float(whole.gates.prune_ratio.detach().max()) > 1e-3


def test_importance_does_not_depend_on_resource_weight(tmp_path):
    """In the trainer too: two steps of warm-up and one with open gates see the same weights."""
    found = [
        trained(tmp_path / str(w), dict(resource_weight=w), max_steps=3).gates.search_state() for w in (0.0, 100.0)
    ]
    names = [name for name in found[0] if name.startswith("importance")]
    assert names
    assert all(torch.equal(found[0][name], found[1][name]) for name in names)


# ---- the optimizer ----
class RecordRates(TrainerCallback):
    """Rates of the weights and of the ratios at every step."""

    def __init__(self):
        self.rates, self.trainer = [], None

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = [*optimizer.param_groups, *self.trainer.gate_optimizer.param_groups]
        self.rates.append([group["lr"] for group in groups])


def recorded(folder, dms_options=None, **options):
    """A trainer that has run, and the rates of its steps."""
    record = RecordRates()
    record.trainer = DMSTrainer(
        model=tiny_llama(), dms_config=dms(**(dms_options or {})), args=arguments(folder, **options),
        train_dataset=Tokens(), callbacks=[record],
    )  # fmt: skip
    record.trainer.train()
    return record.trainer, record.rates


def test_a_backward_pass_before_the_search_changes_nothing(tmp_path):
    model, batch = tiny_llama(), token_batch()
    trainer = DMSTrainer(model=model, dms_config=dms(), args=arguments(tmp_path), train_dataset=Tokens())
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trainer.train()
    assert bit_equal(trainer.gates.search_state(), trained(tmp_path / "plain").gates.search_state())


def test_gates_have_an_optimizer_of_their_own_with_a_constant_rate_and_no_weight_decay(tmp_path):
    trainer, rates = recorded(tmp_path, weight_decay=0.1, lr_scheduler_type="linear", warmup_steps=2)
    (group,) = trainer.gate_optimizer.param_groups
    assert group["params"] == [trainer.gates.prune_ratio]
    assert group["weight_decay"] == 0
    others = [parameter for other in trainer.optimizer.param_groups for parameter in other["params"]]
    assert not any(parameter is trainer.gates.prune_ratio for parameter in others)
    assert len(others) == len(list(trainer.model.parameters())) - 1
    assert [each[-1] for each in rates] == [0.02] * 6
    assert len({each[0] for each in rates}) == 6 - 1  # the rate rises, then falls


def test_the_default_rate_of_the_gates_depends_on_the_length_of_the_search(tmp_path):
    _, rates = recorded(tmp_path, dict(gate_learning_rate=None), max_steps=4)
    assert {each[-1] for each in rates} == {0.05}


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adafactor"])
def test_the_ratios_move_alike_whatever_optimizer_the_weights_have(optim, tmp_path):
    """With frozen weights. When ratios used the user's optimizer, a step of plain SGD moved them from end to end."""
    found, expected = (
        trained(tmp_path / each, dict(pipeline="p-"), optim=each, max_steps=6) for each in (optim, "adamw_torch")
    )
    assert bit_equal(found.gates.search_state(), expected.gates.search_state())
    assert 0.02 < float(found.gates.prune_ratio.detach().max()) <= 4 * 0.02 + 1e-6  # at most a rate a step


def test_a_users_own_optimizer_and_scheduler_work_and_resume(tmp_path):
    def trainer(folder, resume=None):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        made = DMSTrainer(
            model=model, dms_config=dms(), args=arguments(folder, **SAVING), train_dataset=Tokens(),
            optimizers=(optimizer, scheduler),
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        assert made.optimizer.optimizer is optimizer
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-3 * 0.5**8)]
        return made

    whole = trainer(tmp_path / "whole")
    resumed = trainer(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert not bit_equal(weights(whole.model), weights(tiny_llama()))
    assert float(whole.gates.prune_ratio.detach().max()) > 0.02
    assert bit_equal(weights(resumed.model), weights(whole.model))
    assert bit_equal(resumed.gates.search_state(), whole.gates.search_state())


def one_step(folder, model_seed=0, **options):
    """Ratios and weights after one SGD step on half-closed gates, without warm-up."""
    resource_weight = options.pop("resource_weight", 10.0)
    model = tiny_llama(seed=model_seed)
    config = dms(warmup_steps=0, resource_weight=resource_weight, target_schedule="constant")
    trainer = DMSTrainer(
        model=model,
        dms_config=config,
        args=arguments(folder, max_steps=1, optim="sgd", learning_rate=0.5, **options),
        train_dataset=Tokens(),
    )
    search_(model, ratios=(0.1, 0.2))
    before = trainer.gates.prune_ratio.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.gates.prune_ratio, before)
    return trainer.gates.prune_ratio.detach(), weights(model), logged(trainer, "grad_norm")


def test_clipping_does_not_touch_the_gates(tmp_path):
    free, clipped = one_step(tmp_path / "free", max_grad_norm=1e6), one_step(tmp_path / "clip", max_grad_norm=1e-3)
    assert torch.equal(free[0], clipped[0])
    assert not bit_equal(free[1], clipped[1])


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e6])
def test_gate_gradients_do_not_enter_the_clipping_norm(max_grad_norm, tmp_path):
    weak = one_step(tmp_path / "weak", resource_weight=0.0, max_grad_norm=max_grad_norm)
    strong = one_step(tmp_path / "strong", resource_weight=1e4, max_grad_norm=max_grad_norm)
    assert bit_equal(weak[1], strong[1])
    assert weak[2] == strong[2]
    assert not torch.equal(weak[0], strong[0])


def test_pipeline_p_minus_moves_the_gates_alone(tmp_path):
    model = tiny_llama()
    before = weights(model)
    trainer = trained(tmp_path, dict(pipeline="p-"), model=model, max_steps=5)
    assert bit_equal(weights(model), before)
    assert float(trainer.gates.prune_ratio.detach().max()) > 0
    assert all(trainer.gates.raw_importance(name).any() for name in trainer.gates.dims)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_model_has_no_dropout(checkpointing, tmp_path):
    """Activation checkpointing stays on too, though transformers has it in training mode only."""
    found = []
    for dropout in (0.0, 0.5):
        model = tiny(BertForSequenceClassification, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        calls, layer = [], model.bert.encoder.layer[0]
        trainer = DMSTrainer(
            model=model, dms_config=dms(pipeline="p-"), train_dataset=Classified(),
            args=arguments(tmp_path / str(dropout), activation_checkpointing=checkpointing),
        )  # fmt: skip
        layer.attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        assert len(calls) == 6 * (2 if checkpointing else 1)  # layers run again in the backward pass
        found.append((trainer.gates.search_state(), logged(trainer, "loss")))
    assert bit_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_model_in_training_has_dropout(tmp_path):
    found = [logged(trained(tmp_path / str(p), model=tiny_llama(attention_dropout=p)), "loss") for p in (0.0, 0.5)]
    assert found[0] != found[1]


def test_batch_norms_of_a_frozen_model_see_batches():
    model = tiny_llama()
    attach_(model, dms(pipeline="p-"))
    model.norm, model.dropout = torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)
    model.train()
    frozen_mode_(model)
    assert model.norm.training
    assert model.dms_gates.training
    assert not any(module.training for module in (model.dropout, model.model, *model.model.modules()))


@pytest.mark.parametrize("pipeline", ["p", "p-"])
def test_after_detach_requires_grad_is_as_it_was_before_the_search(pipeline, tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained(tmp_path, dict(pipeline=pipeline), model=model, max_steps=3)
    detach_(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert set(before.values()) == {False, True}


def test_pipeline_p_trains_the_weights_too(tmp_path):
    model = tiny_llama()
    before = weights(model)
    trained(tmp_path, model=model, max_steps=3)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("pipeline", ["p", "p-"])
def test_checkpointing_of_activations_changes_nothing(pipeline, tmp_path):
    found = []
    for checkpointing in (False, True):
        options = dict(activation_checkpointing=checkpointing, max_steps=4)
        trainer = trained(tmp_path / str(checkpointing), dict(pipeline=pipeline), **options)
        found.append((trainer.gates.search_state(), logged(trainer, "loss")))
    assert bit_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# ---- losses and gradients that are not finite ----
class WatchSteps(TrainerCallback):
    """Whether a step changed the weights, the ratios or the importance; from `poison_at` on, every image is bad."""

    def __init__(self, poison_at=10**9):
        self.changed, self.poison_at = [], poison_at

    def on_step_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if state.global_step == self.poison_at:
            for parameter in model.parameters():
                parameter.register_hook(lambda grad: grad * float("nan"))
        self.before = weights(model) | {name: t.clone() for name, t in gates_of(model).search_state().items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.changed.append(not bit_equal(weights(model) | gates_of(model).search_state(), self.before))


def poisoned_trainer(folder, data, watch, **options):
    dms_options = {"warmup_steps": 0, "max_nonfinite_steps": options.pop("max_nonfinite_steps", 10)}
    return DMSTrainer(
        model=tiny(ViTForImageClassification), dms_config=dms(**dms_options), args=arguments(folder, **options),
        train_dataset=data, callbacks=[watch],
    )  # fmt: skip


def test_a_step_on_bad_data_is_skipped_counted_and_leaves_no_trace(tmp_path):
    watch = WatchSteps()
    trainer = poisoned_trainer(tmp_path, Poisoned([5]), watch, max_steps=6, weight_decay=0.1)
    trainer.train()
    assert sorted(watch.changed) == [False] * 3 + [True] * 3  # two batches an epoch, one of them bad
    assert trainer.gates.num_updates == 3
    assert trainer.skipped_steps == logged(trainer, "skipped_steps")[-1] == 3
    entries = [entry for entry in trainer.state.log_history if "resource" in entry]
    assert ["task_loss" in entry for entry in entries] == watch.changed
    state = trainer.model.state_dict() | trainer.gates.search_state()
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_gradients_that_are_not_finite_are_skipped_though_the_loss_is(tmp_path):
    watch = WatchSteps(poison_at=3)
    poisoned_trainer(tmp_path, Images(), watch, max_steps=5).train()
    assert watch.changed == [True] * 3 + [False] * 2


def test_too_many_bad_steps_in_a_row_stop_the_search_with_its_last_checkpoint_intact(tmp_path):
    watch = WatchSteps(poison_at=4)
    options = dict(save_strategy="steps", save_steps=2, max_steps=12)
    trainer = poisoned_trainer(tmp_path, Images(), watch, max_nonfinite_steps=3, **options)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 7, had .* not finite \(loss"):
        trainer.train()
    last = tmp_path / "checkpoint-6"  # saved between two bad steps
    resumed = poisoned_trainer(tmp_path, Images(), WatchSteps(), **options)
    resumed.train(resume_from_checkpoint=str(last))
    assert resumed.state.global_step == 12
    assert resumed.gates.num_updates == 4 + 6
    assert logged(resumed, "task_loss")[-1] == pytest.approx(logged(resumed, "loss")[-1], rel=1)


# ---- logs and evaluation ----
def test_logs_show_task_loss_resource_target_and_kept_units(tmp_path):
    trainer = trained(tmp_path, dict(resource_weight=2.0), max_steps=8, eval_strategy="steps", eval_steps=4)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["target"] for entry in entries[:2]] == [1.0, 1.0]
    assert entries[-1]["target"] == 0.6
    dims = ("kv", "mlp", "hidden", "layers")
    kept = {f"{what}/{name}" for what in ("kept", "soft_fraction") for name in dims}
    kept |= {"kept_min/mlp", "kept_max/mlp", "gate_grad_norm", "skipped_steps"}
    for entry in entries:
        assert {"task_loss", "resource_loss", "resource", "target", *kept} <= entry.keys()
        assert 0 < entry["resource"] <= 1
    assert entries[-1]["resource"] < 1
    assert entries[0]["kept/mlp"] == 20
    assert "kept_min/hidden" not in entries[0]  # hidden has one size for all layers
    for entry in entries:
        assert entry["kept_min/mlp"] <= entry["kept/mlp"] <= entry["kept_max/mlp"]
    assert entries[0]["gate_grad_norm"] == 0  # the warm-up has no resource loss
    assert entries[3]["gate_grad_norm"] > 0
    assert [entries[0][f"soft_fraction/{name}"] for name in dims] == [0] * 4
    assert max(entries[-1][f"soft_fraction/{name}"] for name in dims) > 0
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [0 < entry["eval_resource"] <= 1 for entry in evaluated] == [True, True]


def test_logs_average_the_task_loss_since_the_last_log(tmp_path):
    every = trained(tmp_path / "1", max_steps=6)
    third = trained(tmp_path / "3", max_steps=6, logging_steps=3)
    losses = logged(every, "task_loss")
    expected = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert logged(third, "task_loss") == pytest.approx(expected, rel=1e-4)


class PruneAtEvaluation(TrainerCallback):
    """A callback that cuts the model at every evaluation and evaluates the cut separately."""

    def __init__(self, folder):
        self.folder, self.trainer, self.found, self.logits = folder, None, [], []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        model, pruned = self.trainer.model, self.trainer.prune()
        plain = Trainer(model=pruned, args=arguments(self.folder), eval_dataset=Tokens(8, seed=1))
        self.found.append((plain.evaluate()["eval_loss"], pruned.num_parameters() / tiny_llama().num_parameters()))
        masked, cut_ = (outputs_of(each.eval(), token_batch()) for each in (model, pruned))
        self.logits.append(relative_difference(cut_, masked))


@pytest.mark.parametrize(
    ("layout", "options"),
    ordinary_if(
        lambda layout, options: (layout == "uniform") == ("round_to" in options),
        itertools.product(["uniform", "per_layer"], [{"round_to": {"mlp": 4}}, {"target": 0.8}, {"target": 0.35}]),
    ),
)
def test_every_evaluation_is_of_the_model_that_prune_cuts_in_loss_logits_and_resource(layout, options, tmp_path):
    """Evaluated before the ratios move, while the target falls, and at the end."""
    seen = PruneAtEvaluation(tmp_path / "plain")
    trainer = DMSTrainer(
        model=tiny_llama(),
        dms_config=dms(layout=layout, gate_learning_rate=0.1, **options),
        args=arguments(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=1),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=1),
        callbacks=[seen],
    )
    seen.trainer = trainer
    trainer.train()
    assert len(seen.found) == 8
    assert logged(trainer, "eval_loss") == pytest.approx([loss for loss, _ in seen.found], rel=1e-5)
    assert logged(trainer, "eval_resource") == pytest.approx([resource for _, resource in seen.found], rel=1e-6)
    assert max(logged(trainer, "eval_resource")) <= trainer.dms_config.target
    assert max(seen.logits) < 1e-5


def test_evaluations_on_several_sets_log_the_resource_too(tmp_path):
    trainer = trained(tmp_path, max_steps=4)
    trainer.evaluate({"seen": Tokens(8), "new": Tokens(8, seed=1)})
    for name, entry in zip(("seen", "new"), trainer.state.log_history[-2:]):
        assert f"eval_{name}_loss" in entry
        assert 0 < entry["eval_resource"] <= trainer.dms_config.target


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_prune_returns_a_plain_model_within_the_budget(layout, tmp_path):
    dense = tiny_llama()
    assert dense.config.use_cache is True
    trainer = trained(tmp_path, dict(layout=layout), model=dense, max_steps=5)
    state = weights(dense)
    pruned = trainer.prune()
    assert sum(p.numel() for p in pruned.parameters()) <= 0.6 * tiny_llama().num_parameters()
    assert pruned.config.use_cache is True
    assert not hasattr(pruned, "dms_gates")
    assert not pruned.training
    assert bit_equal(weights(trainer.model), state)
    assert pruned.generate(**token_batch(), max_new_tokens=3).shape == (2, 10)


def test_prune_keeps_a_cache_that_was_off(tmp_path):
    model = tiny_llama(use_cache=False)
    assert trained(tmp_path, model=model, max_steps=3).prune().config.use_cache is False


# ---- checkpoints ----
SAVING = dict(save_strategy="steps", save_steps=4, max_steps=8)


def test_checkpoints_hold_the_search_beside_model_files_without_gates(tmp_path):
    trainer = trained(tmp_path, **SAVING)
    folder = tmp_path / "checkpoint-8"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny_llama().state_dict())
    with safe_open(folder / "dms_state.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    moments = trainer.gate_optimizer.state[trainer.gates.prune_ratio]
    moments = {f"optimizer_0_{name}": tensor for name, tensor in moments.items()}
    assert bit_equal(state, trainer.gates.search_state() | moments)
    summary = json.loads((folder / "dms_state.json").read_text())
    assert DMSConfig(**summary["dms_config"]) == trainer.dms_config
    assert summary["kept_units"]["mlp"] == trainer.gates.hard_units("mlp").tolist()
    assert summary["hard_resource"] == float(trainer.gates.resource(trainer.gates.hard_sizes()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"logging_steps": 5},  # a checkpoint lies between two logs
        {"max_steps": -1, "num_train_epochs": 2.5, "eval_strategy": "epoch"},
    ],
)
def test_resume_equals_uninterrupted_bit_for_bit(options, tmp_path):
    """Four steps are an epoch: one checkpoint is at its end, the other in the middle."""
    options = SAVING | {"save_steps": 2} | options
    model = dict(attention_dropout=0.1)
    whole = trained(tmp_path, **options, model=tiny_llama(**model))
    for checkpoint in (6, 4):
        resume = str(tmp_path / f"checkpoint-{checkpoint}")
        resumed = trained(tmp_path, **options, model=tiny_llama(seed=9, **model), resume=resume)
        assert resumed.state.global_step == whole.state.global_step == (10 if "num_train_epochs" in options else 8)
        assert bit_equal(weights(resumed.model), weights(whole.model))
        assert bit_equal(resumed.gates.search_state(), whole.gates.search_state())
        assert stories(resumed) == stories(whole)
        assert logged(resumed, "task_loss")


@pytest.mark.parametrize("restore", [False, True])
def test_skipped_steps_are_counted_on_after_a_resume(restore, tmp_path):
    options = dict(save_strategy="steps", save_steps=2, max_steps=8, logging_nan_inf_filter=True)
    options["restore_callback_states_from_checkpoint"] = restore  # if true, Trainer replaces its callbacks
    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = poisoned_trainer(tmp_path, Poisoned([5]), WatchSteps(), **options)
        trainer.train(resume_from_checkpoint=resume)
        found.append((trainer.skipped_steps, stories(trainer)))
    assert found[0][0] == 4
    assert found[1] == found[0]


def die_in_the_middle(number):
    """A `torch.save` that writes half a file when it is called for the n-th time, and is killed."""
    save, calls = torch.save, iter(range(1, 1000))

    def torch_save(content, file, *args, **kwargs):
        if next(calls) == number:
            Path(file).write_bytes(b"PK half a file")
            raise KeyboardInterrupt
        save(content, file, *args, **kwargs)

    return torch_save


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"), **SAVING)


@pytest.mark.parametrize(
    ("number", "limit"),  # of four files per checkpoint
    ordinary_if(lambda number, limit: (number == 6) == (limit is None), itertools.product([5, 6, 7, 8], [None, 1])),
)
def test_a_kill_while_saving_leaves_the_checkpoint_before_as_the_last(
    number, limit, uninterrupted, tmp_path, monkeypatch
):
    options = SAVING | {"save_total_limit": limit}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die_in_the_middle(number))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", **options)
    assert get_last_checkpoint(str(tmp_path / "killed")) == str(tmp_path / "killed" / "checkpoint-4")
    resumed = trained(tmp_path / "killed", **options, resume=True)
    assert bit_equal(weights(resumed.model), weights(uninterrupted.model))
    assert stories(resumed) == stories(uninterrupted)
    kept = {path.name for path in (tmp_path / "killed").iterdir()}
    assert kept == ({"checkpoint-8"} if limit else {"checkpoint-4", "checkpoint-8"})


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_checkpoints_stay_than_the_limit_says(limit, tmp_path):
    trained(tmp_path, save_strategy="epoch", max_steps=10, save_total_limit=limit)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (8, 10)[-limit:]}


def test_resume_from_a_checkpoint_without_a_search_is_an_error(tmp_path):
    Trainer(model=tiny_llama(), args=arguments(tmp_path, **SAVING), train_dataset=Tokens()).train()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 has no dms_state.safetensors: it is not a checkpoint of a DMS search"
    ):
        trained(tmp_path, **SAVING, resume=str(tmp_path / "checkpoint-4"))


def best_of(folder, metric, greater, target, callbacks=(), resume=None, **options):
    steps = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, max_steps=18)
    best = dict(load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=greater)
    config = dict(target=target, gate_learning_rate=0.08, resource_weight=20.0)
    return trained(folder, config, callbacks=callbacks, resume=resume, **steps | best | options)


def test_every_checkpoint_meets_the_target_and_any_can_be_the_best(tmp_path):
    trainer = best_of(tmp_path, "resource", True, 0.7)
    saved = {
        step: json.loads((tmp_path / f"checkpoint-{step}" / "dms_state.json").read_text())["hard_resource"]
        for step in range(3, 19, 3)
    }
    assert 0.6 < min(saved.values()) <= max(saved.values()) <= 0.7
    best = max(saved, key=saved.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert float(trainer.gates.resource(trainer.gates.hard_sizes())) == saved[best]
    twin = DMSTrainer(model=tiny_llama(), dms_config=trainer.dms_config, args=arguments(tmp_path / "other"))
    load_search_state_(twin.model, tmp_path / f"checkpoint-{best}")
    assert bit_equal(trainer.gates.search_state(), twin.gates.search_state())


def test_the_best_model_is_kept_beside_the_last_and_found_again(tmp_path):
    trainer = best_of(tmp_path, "resource", True, 0.7, save_total_limit=1)
    best = Path(trainer.state.best_model_checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == [best.name]
    again = DMSTrainer(
        model=tiny_llama(seed=4), dms_config=trainer.dms_config, args=trainer.args, train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=1),
    )  # fmt: skip
    train_or_resume_(again)
    assert again.state.best_model_checkpoint == str(best)
    assert bit_equal(weights(again.model), weights(trainer.model))
    assert bit_equal(again.gates.search_state(), trainer.gates.search_state())


def test_a_finished_run_is_loaded_with_its_best_model(tmp_path):
    trainer = best_of(tmp_path, "resource", True, 0.7)
    assert trainer.state.best_global_step < 18
    again = DMSTrainer(
        model=tiny_llama(seed=4), dms_config=trainer.dms_config, args=trainer.args, eval_dataset=Tokens(8, seed=1)
    )
    train_or_resume_(again)
    assert bit_equal(weights(again.model), weights(trainer.model))
    assert bit_equal(again.gates.search_state(), trainer.gates.search_state())


def test_early_stopping_waits_until_the_target_has_fallen(tmp_path):
    """By this measure a lower loss is worse, so a patience of 1 ends the search as soon as evaluations count."""
    trainer = best_of(tmp_path, "loss", True, 0.7, callbacks=[EarlyStoppingCallback(1)], max_steps=30)
    fallen = [entry["step"] for entry in trainer.state.log_history if entry.get("target") == 0.7]
    stopped = trainer.state.global_step
    assert stopped < 30
    assert stopped == next(step for step in range(3, 31, 3) if step >= fallen[0])


# ---- compiling, precision and files ----
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch
def test_compiling_changes_nothing(tmp_path):
    """Kernels may sum in another order. The relative difference was 2e-7 after six steps."""
    options, layers = dict(optim="sgd", max_steps=6), dict(num_hidden_layers=2)
    plain = trained(tmp_path / "plain", model=tiny_llama(**layers), **options)
    compiling = dict(torch_compile=True, torch_compile_backend="aot_eager")
    compiled = trained(tmp_path / "compiled", model=tiny_llama(**layers), **options, **compiling)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert torch.allclose(compiled.gates.prune_ratio, plain.gates.prune_ratio, atol=1e-5)
    assert float(plain.gates.prune_ratio.detach().max()) > 0.03  # the ratios have moved
    for name in plain.gates.dims:
        assert relative_difference(compiled.gates.raw_importance(name), plain.gates.raw_importance(name)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"bf16": True}),
        (torch.float32, {"bf16": True, "activation_checkpointing": True}),
        (torch.float32, {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        (torch.bfloat16, {}),
    ],
)
def test_half_precision_gives_nearly_the_same_ratios(dtype, options, tmp_path):
    """bf16 rounds to 2^-8 of a value: ratios of 0.12 differ by 0.002 after ten steps. Ranks that flip drive longer
    searches of so small a model apart."""
    config = dict(decide_at=1.0)
    exact = trained(tmp_path / "exact", config, max_steps=10, learning_rate=1e-4)
    half = trained(tmp_path / "half", config, tiny_llama(dtype=dtype), max_steps=10, learning_rate=1e-4, **options)
    assert half.gates.prune_ratio.dtype == torch.float32
    assert float(exact.gates.prune_ratio.detach().min()) > 0.1
    assert torch.allclose(half.gates.prune_ratio, exact.gates.prune_ratio, atol=0.01)


def test_a_search_in_mixed_precision_is_cut_in_the_models_own_and_goes_on_in_mixed(tmp_path):
    trainer = trained(tmp_path, bf16=True)
    pruned = trainer.prune()
    assert pruned.dtype == torch.float32
    assert outputs_of(pruned, token_batch()).dtype == torch.float32
    with torch.no_grad():
        mixed = trainer.model(**token_batch()).logits
    detach_(trainer.model)
    plain = tiny_llama()
    plain.load_state_dict(trainer.model.state_dict())
    assert not torch.equal(mixed, outputs_of(plain.train(), token_batch()))


def vit_trainer(folder, **options):
    return DMSTrainer(
        model=tiny(ViTForImageClassification), dms_config=dms(), args=arguments(folder, **options),
        train_dataset=Images(), eval_dataset=Images(),
    )  # fmt: skip


def test_a_model_whose_files_rename_its_parameters_resumes_with_its_weights(tmp_path):
    options = dict(save_strategy="steps", save_steps=3)
    whole = vit_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = vit_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert bit_equal(weights(resumed.model), weights(whole.model))
    assert bit_equal(resumed.gates.search_state(), whole.gates.search_state())


def test_the_best_model_is_loaded_whatever_its_files_call_its_parameters(tmp_path):
    options = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, max_steps=6)
    trainer = vit_trainer(tmp_path, **options, load_best_model_at_end=True)
    trainer.dms_config.target = 1.0  # so that every evaluation counts
    trainer.train()
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert bit_equal(weights(trainer.model), weights(best))


# ---- how it ended ----
def with_ratios(folder, ratio, **options):
    trainer = DMSTrainer(model=tiny_llama(), dms_config=dms(**options), args=arguments(folder), train_dataset=Tokens())
    search_(trainer.model, ratios=(ratio, ratio))
    return trainer


def test_a_search_that_ends_on_target_says_nothing(tmp_path, caplog):
    trainer = with_ratios(tmp_path, 0.4, prune=("mlp",), resource_scope="layers", target=1.0)
    learned = trainer.search_outcome()["learned"]
    for target in (learned / 1.009, learned / 0.971):
        outcome = with_ratios(tmp_path, 0.4, prune=("mlp",), resource_scope="layers", target=target).search_outcome()
        assert outcome["verdict"] == "on target"
        assert outcome["message"] == ""
        assert outcome["learned"] == learned
        assert target - 0.02 < outcome["cut"] <= target


@pytest.mark.parametrize(
    ("ratio", "verdict", "message"),
    [
        (0.1, "above", r"search ended at 0.7\d\d of the dense params, above the target 0.6: the cut shrinks .* to 0.5"),
        (0.5, "below", r"search ended at 0.180 of the dense params, below the target 0.6: the cut fills up to 0.5"),
    ],
)
def test_a_search_that_ends_off_its_target_is_told_in_words_and_in_numbers(ratio, verdict, message, tmp_path, caplog):
    trainer = with_ratios(tmp_path, ratio)
    outcome = trainer.search_outcome()
    assert outcome["verdict"] == verdict
    assert re.search(message, outcome["message"])
    assert outcome["target"] == 0.6
    assert outcome["learned"] == pytest.approx(float(trainer.gates.resource().detach()))
    assert json.loads(json.dumps(outcome)) == outcome
    pruned = trainer.prune()
    assert sum(p.numel() for p in pruned.parameters()) / tiny_llama().num_parameters() == pytest.approx(outcome["cut"])
    assert outcome["message"] in caplog.text


def test_a_cut_below_what_was_learned_fills_nothing_up():
    config = DMSConfig(target=0.6)
    assert "the cut fills up to 0.590 with sizes" in _message("below", 0.54, 0.59, config)
    assert "the cut keeps 0.510 with sizes" in _message("below", 0.54, 0.51, config)


def test_the_end_of_a_search_says_that_it_missed_its_target(tmp_path, caplog):
    trainer = trained(tmp_path, dict(gate_learning_rate=1e-4))
    assert trainer.search_outcome()["verdict"] == "above"
    assert trainer.search_outcome()["message"] in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize(("pipeline", "warned"), [("p-", True), ("p", False)])
def test_adapters_that_a_frozen_search_would_not_train_are_warned_of(pipeline, warned, tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    config = dms(pipeline=pipeline)
    DMSTrainer(model=model, dms_config=config, args=arguments(tmp_path), train_dataset=Tokens())
    assert ("so the adapters stay as they are. Use pipeline p" in caplog.text) == warned


# ---- what cannot be served ----
@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_a_search_that_is_all_warm_up_is_refused(length, tmp_path):
    message = r"dms.warmup_steps = 6 and the search has 6 steps .* lower dms.warmup_steps to at most 5"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, dict(warmup_steps=6), **length)
    trained(tmp_path, dict(warmup_steps=5), **length)


def make(folder, model=None, **options):
    kwargs = {} if model is None else {"model": model}
    model_init = options.pop("model_init", None)
    args = arguments(folder)
    for name, value in options.items():
        setattr(args, name, value)
    return DMSTrainer(**kwargs, model_init=model_init, dms_config=dms(), args=args, train_dataset=Tokens())


def test_a_model_init_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DMSTrainer needs model=, not model_init=: the gates belong to one model"):
        make(tmp_path, model_init=lambda: tiny_llama())


def test_reentrant_checkpointing_is_refused(tmp_path):
    options = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        trained(tmp_path, **options)


def test_fp16_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.fp16 = True  # TrainingArguments itself refuses it without a GPU
    with pytest.raises(ValueError, match=r"fp16=True scales the loss, and with it the importance. Use bf16=True"):
        check_training_arguments(args)


def test_a_model_with_gates_already_is_refused(tmp_path):
    model = tiny_llama()
    make(tmp_path, model)
    with pytest.raises(ValueError, match="has gates already"):
        make(tmp_path, model)


def test_example_inputs_are_those_of_the_evaluation_data(tmp_path):
    trainer = trained(tmp_path)
    inputs = trainer.example_inputs()
    assert torch.equal(inputs["input_ids"][0], Tokens(8, seed=1)[0]["input_ids"])
    assert outputs_of(trainer.model, inputs).shape == (1, 8, 33)
    assert gates_of(trainer.model) is trainer.gates
