"""The search, as a `transformers.Trainer`: it adds the resource loss, trains the gates, and saves their state.

`DMSMixin` works over any subclass of Trainer (`class DMSSFTTrainer(DMSMixin, SFTTrainer)`). `DMSTrainer` is the mixin
over Trainer itself. Nothing here knows about shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..archs.plain_view import base_model_of, is_packed, packed_weights_may_stay
from ..checkpoint.hub import check_not_base
from ..checkpoint.search_state import load_search_state_, save_search_state
from ..config import SEARCH, DMSConfig
from ..errors import HfDmsError
from ..files import check_not_source
from ..gates import Gates
from ..gating.attach import attach_, freeze_, frozen_mode_, gates_of
from ..gating.outcome import warn_of_outcome
from ..gating.scales import scale_rate
from .dense_logits import check_divergence, kl_to_dense, outputs_with_open_masks
from .distributed import check_launch, check_plugin, leave_gates_out_, without_ddp_for_frozen
from .exact_resume import ExactCheckpointsMixin, loss_is_summed_over_micro_batches
from .kept_plans import KeptPlans
from .progress import show_progress_
from .refitting import RefitCallback
from .result import SearchResultMixin
from .step_guard import FiniteStepsMixin
from .taught import without_labels

logger = logging.get_logger(__name__)


class DMSMixin(SearchResultMixin, FiniteStepsMixin, ExactCheckpointsMixin):
    """What a DMS search adds to a Trainer.

    Args:
        dms_config: what to prune and how far. All other arguments are the Trainer's.

    Raises:
        ValueError: `hf_dms.attach_` refuses the model or the request; the arguments ask for fp16 loss scaling, or give
            `model_init` instead of a model; pipeline np gets loaded weights; or `output_dir` or the Hub's repository is
            that of the dense model.
    """

    def __init__(self, *args: Any, dms_config: DMSConfig, **kwargs: Any) -> None:
        if kwargs.get("model_init") is not None:
            raise HfDmsError("DMSTrainer needs model=, not model_init=: the gates belong to one model.")
        if dms_config.strategy != SEARCH:
            raise HfDmsError(
                f"DMSTrainer searches, and dms.strategy is {dms_config.strategy}, which needs no search. Use "
                "hf_dms.attach_, choose_ and prune (docs/strategies.md), or leave strategy out."
            )
        model: Any = args[0] if args else kwargs.get("model")
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        self._source = Path(model.name_or_path).resolve() if getattr(model, "name_or_path", "") else None
        # Before Trainer's own `__init__`, which makes the output folder and, with push_to_hub, the repository.
        _check_places(model, kwargs.get("args", args[1] if len(args) > 1 else None), self._source)
        # Trainer refuses to train packed weights without adapters. Here only ratios train.
        with packed_weights_may_stay(model if dms_config.pipeline == "p-" else None):
            super().__init__(*args, max_nonfinite_steps=dms_config.max_nonfinite_steps, **kwargs)
        self._use_cache = use_cache  # the Trainer has switched it off; `prune` restores it
        check_training_arguments(self.args)
        check_plugin(self.accelerator, self.model)
        self.dms_config = dms_config
        # With epochs the number of steps is known only when training begins, and `_GateCallback` checks it.
        if self.args.max_steps > 0:
            dms_config.check_length(self.args.max_steps)
        if dms_config.pipeline == "np":
            check_untrained(self.model)
        if dms_config.kl_weight:
            check_divergence(self.model)
        trainable = any(parameter.requires_grad for parameter in self.model.parameters())
        if dms_config.pipeline == "p-" and trainable and self.model is not base_model_of(self.model):
            logger.warning(
                "dms.pipeline p- trains nothing but the gates, so the adapters stay as they are. Use pipeline p to "
                "train them beside the search."
            )
        # After all checks, Trainer's own too, so that an error leaves the model without gates. Before Trainer wraps the
        # model, which it does in `train`.
        attach_(self.model, dms_config)
        self.dms_config = self.gates.attachment.config  # with an amount or a shape converted to a fraction
        leave_gates_out_(self.model, self.gates, self.accelerator)
        if dms_config.pipeline == "p-":
            freeze_(self.model)
        # The gates have their own Adam: with the user's optimizer (SGD, RMSprop, weight decay) the resource would
        # depend on settings that were chosen for the weights. It has no schedule either: Trainer's decay would stop the
        # ratios before they have followed the falling target.
        learned = [[self.gates.prune_ratio], [*self.gates.scales.values()]]
        self.gate_optimizer = torch.optim.Adam([{"params": tensors} for tensors in learned if tensors])
        self._step_task_loss = torch.zeros((), device=self.args.device)
        self._task_loss = torch.zeros((), device=self.args.device)
        self._gate_grad_norm = torch.zeros((), device=self.args.device)
        self._steps_since_log = 0
        self.kept_plans = KeptPlans(self)
        self.add_callback(_GateCallback(self))
        self.add_callback(self.kept_plans)
        if dms_config.search_over == "refitted":
            self.add_callback(RefitCallback(self))
        show_progress_(self, "search")

    @property
    def gates(self) -> Gates:
        """The gates of the model in training."""
        return gates_of(self._unwrapped())

    @property
    def progress(self) -> float:
        """Fraction of the search after its warm-up that is done, in [0, 1]."""
        return self.progress_at(self.state.global_step)

    def progress_at(self, step: int) -> float:
        """`progress` after that many optimizer steps."""
        warmup = self.dms_config.warmup_steps
        # The target falls over what is left after the warm-up, in which no ratio moves.
        return min(max(step - warmup, 0) / max(self.state.max_steps - warmup, 1), 1.0)

    @property
    def gate_learning_rate(self) -> float:
        """The constant learning rate of the prune ratios."""
        steps = self.state.max_steps or self.args.max_steps
        return float(self.dms_config.with_defaults_for(steps).gate_learning_rate or 0)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        # Evaluation measures the task: no resource loss, no divergence.
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if self.dms_config.pipeline == "p-":
            frozen_mode_(self._unwrapped())  # because the Trainer has just put the whole model into training mode
        # With gradient accumulation, the gradients of all micro-batches add up. If the task loss of each is already its
        # part of the step's mean (`scaled`), the other terms need the factor `share`, or they would count several
        # times.
        scaled = loss_is_summed_over_micro_batches(self, num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps
        # With open masks the divergence and its gradient are 0, and the dense forward pass would be for nothing.
        weight = 0.0 if self.gates.is_warming_up else self.dms_config.kl_weight
        dense = outputs_with_open_masks(self._unwrapped(), model, inputs) if weight else None
        outputs = None
        if weight == 1:  # the task's loss does not count, so its memory is saved
            loss, outputs = torch.zeros((), device=self.args.device), model(**without_labels(inputs))
        elif dense is not None or return_outputs:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if dense is not None:
            divergence = kl_to_dense(self._unwrapped(), outputs, dense, inputs.get("labels"))
            loss = (1 - weight) * loss + weight * divergence * (share if scaled else 1.0)
        self._step_task_loss += loss.detach() * (1.0 if scaled else share)
        # After the task's loss was noted: logs show the two apart, and importance does not see the resource.
        loss = loss + self.gates.resource_loss(self.progress).to(loss.device) * (share if scaled else 1.0)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        gate = self.gates.prune_ratio
        for group in optimizer.param_groups:
            # Trainer has collected every parameter that trains, the ratios among them; they have an Adam of their own.
            # Scales are no parameters.
            group["params"] = [parameter for parameter in group["params"] if parameter is not gate]
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any):
        with without_ddp_for_frozen(self.model, self.gates, self.accelerator):
            return super()._prepare_for_training(*args, **kwargs)

    def _clip_grad_norm(self, model):
        # Clipping is for the weights. The ratios' gradient would change their norm, and be scaled by it.
        with self._gate_gradient_apart():
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        with self._gate_gradient_apart():
            return super()._get_grad_norm(model, grad_norm=grad_norm)

    @contextlib.contextmanager
    def _gate_gradient_apart(self) -> Iterator[None]:
        gate = self.gates.prune_ratio
        grad, gate.grad = gate.grad, None
        try:
            yield
        finally:
            gate.grad = grad

    def _step_tensors(self) -> list[Tensor]:
        return [*self.gates.step_terms(), self._step_task_loss]

    def _take_step_(self) -> None:
        # Before the optimizer's step: it hands the scales their gradients.
        self.gates.update_importance_()
        self._task_loss += self._step_task_loss
        # By now an average over processes (`_finish_backward_`).
        *_, ratio_gradient = self.gates.step_terms()
        self._gate_grad_norm += ratio_gradient.norm()
        # Set anew before each step, so that a resumed search needs nothing but its step number.
        for group, rate in zip(self.gate_optimizer.param_groups, (1.0, scale_rate(self.progress))):
            group["lr"] = rate * self.gate_learning_rate
        self.gate_optimizer.step()
        self.gate_optimizer.zero_grad()
        # Adam's step may leave [0, 1] or the allowed sizes; evaluation and logs between two steps must not see that.
        self.gates.clamp_ratios_()
        self._steps_since_log += 1
        self._step_task_loss.zero_()

    def _forget_step_(self) -> None:
        self.gates.forget_step_()
        self.gate_optimizer.zero_grad()
        self._step_task_loss.zero_()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Trainer sends logs of training, evaluations and its summary through here; only their keys tell them apart.
        if "loss" in logs:
            logs |= self._search_logs()
        elif any(name.startswith("eval_") and name.endswith("_loss") for name in logs):  # eval_NAME_loss: several sets
            # Beside the loss of the cut model, its cost: a low loss means little while the model is still large.
            logs["eval_resource"] = float(self.gates.resource(self.gates.hard_sizes()))
        super().log(logs, *args, **kwargs)

    def _search_logs(self) -> dict[str, float]:
        gates, steps = self.gates, max(self._steps_since_log, 1)
        logs = {
            "resource_loss": float(gates.resource_loss(self.progress).detach()),
            "resource": float(gates.resource().detach()),
            "target": gates.target(self.progress),
            "gate_grad_norm": float(self._gate_grad_norm) / steps,
        }
        if self._steps_since_log:  # 0 if all steps were skipped
            logs["task_loss"] = float(self._task_loss) / steps
        self._task_loss.zero_()
        self._gate_grad_norm.zero_()
        self._steps_since_log = 0
        return logs | self._dim_logs()

    def _dim_logs(self) -> dict[str, float]:
        """Units kept per dim (mean over layers; smallest and largest for several ratios), and its soft fraction."""
        gates, logs = self.gates, {}
        for name, dim in gates.dims.items():
            kept = gates.learned_units(name).float()
            logs[f"kept/{name}"] = float(kept.mean())
            if dim.num_ratios > 1:
                logs |= {f"kept_min/{name}": float(kept.min()), f"kept_max/{name}": float(kept.max())}
            logs[f"soft_fraction/{name}"] = float(gates.soft_fraction(name))
        return logs

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        callbacks = self.callback_handler.callbacks
        # While the target falls, the loss rises. Early stopping would take that for a failure, so it does not see
        # evaluations before the final target.
        if self.gates.target(self.progress) > self.dms_config.target:
            seeing = [callback for callback in callbacks if not isinstance(callback, EarlyStoppingCallback)]
            self.callback_handler.callbacks = seeing
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.callback_handler.callbacks = callbacks

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        # A Trainer whose `output_dir` is the dense model's folder would write over what it was loaded from.
        check_not_source(folder, self._source)
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            save_search_state(self._unwrapped(), folder, self.gate_optimizer)
            self.kept_plans.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self._weights_are_fixed():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_search_state_(self._unwrapped(), resume_from_checkpoint, self.gate_optimizer)
        self.kept_plans.load_(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._weights_are_fixed():
            super()._load_best_model()
        # Without the optimizer: the search has ended.
        load_search_state_(self._unwrapped(), self.state.best_model_checkpoint)

    def _weights_are_fixed(self) -> bool:
        """Whether weights are packed and only ratios train. Trainer cannot load packed weights, and need not here."""
        return self.dms_config.pipeline == "p-" and any(map(is_packed, self._unwrapped().modules()))


def _check_places(model: Any, arguments: TrainingArguments | None, source: Path | None) -> None:
    """Check that neither `save_model` at the end of the search nor a push would replace the dense model."""
    if arguments is not None:
        check_not_source(str(arguments.output_dir), source)
        if arguments.push_to_hub and arguments.hub_model_id and source is not None:
            check_not_base(arguments.hub_model_id, arguments.hub_revision, model.name_or_path)


def check_training_arguments(arguments: TrainingArguments) -> None:
    """Check that a search can run with these arguments.

    Raises:
        ValueError: they ask for loss scaling or reentrant checkpointing, or the launch cannot work.
    """
    check_launch(arguments)
    if arguments.fp16:
        raise HfDmsError("fp16=True scales the loss, and with it the importance. Use bf16=True.")
    checkpointing: Any = arguments.gradient_checkpointing_kwargs or {}
    if arguments.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise HfDmsError("use_reentrant=True is not supported. Leave it out: non-reentrant is the default.")


def check_untrained(model: PreTrainedModel) -> None:
    """Check that no weight of a model was loaded from a file. transformers marks the weights that it loads.

    Raises:
        ValueError: some weights were loaded.
    """
    if any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters()):
        raise HfDmsError(
            "dms.pipeline np searches a model with random weights, and this one was loaded from "
            f"'{model.name_or_path}'. Use pipeline p, which trains loaded weights, or p-, which keeps them; or make "
            "the model from its config, or a larger one by hf_dms.supernet."
        )


class DMSTrainer(DMSMixin, Trainer):  # type: ignore[misc]  # push_to_hub returns what hf_dms.push does
    """A `transformers.Trainer` that searches with DMS: `DMSTrainer(model=..., dms_config=..., args=..., ...)`."""


class _GateCallback(TrainerCallback):
    """Refuses a search that is all warm-up, calls `decide_` before each step, and warns of the outcome."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.dms_config.check_length(state.max_steps)
        # A backward pass of a call that an error ended, or of the user, must not count in the first step.
        self.trainer._forget_step_()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.is_world_process_zero():
            warn_of_outcome(self.trainer._unwrapped())

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.gates.decide_(self.trainer.progress)
