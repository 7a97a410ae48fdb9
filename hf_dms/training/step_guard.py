"""Guard against steps with a loss or gradients that are not finite: skip and count them, and stop after too many.

A search adds its own tensors to a step (Taylor terms, the gradient of the ratios) through three hooks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..errors import NonFiniteError
from .distributed import average_over_processes_

OverTrainer: Any = object  # base of mixins over a Trainer; typed Any, because they use a Trainer's attributes
logger = logging.get_logger(__name__)


class FiniteStepsMixin(OverTrainer):
    """Makes a Trainer skip a step completely if its loss or gradients are not finite in any process.

    Args:
        max_nonfinite_steps: number of such steps in a row that ends the run.

    Raises:
        NonFiniteError: in training, after that many steps in a row.
    """

    def __init__(self, *args: Any, max_nonfinite_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_nonfinite_steps = max_nonfinite_steps
        self._step_loss = torch.zeros((), device=self.args.device)
        self._grad_norm = torch.zeros((), device=self.args.device)
        self.add_callback(SkippedSteps())
        # A callback, because its event is the only hook between a step's last backward pass and the optimizer:
        # `training_step` runs once per micro-batch, and does not know which one is the last.
        self.add_callback(_BeforeOptimizer(self))

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped since the run began, also before it was interrupted."""
        return self._skipped().total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # Kept on the device: reading a number here would make the GPU wait in every micro-batch.
        self._step_loss += loss.detach()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Under FSDP2 the norm is a tensor over all processes, even if each of them holds the same number.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._grad_norm = torch.as_tensor(0.0 if norm is None else norm, device=self.args.device).float()
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps
            bad = [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
            logs = {name: value for name, value in logs.items() if name not in bad}  # JSON has no nan or infinity
        super().log(logs, *args, **kwargs)

    # ---- hooks -------------------------------------------------------------------------------------------------------
    def _step_tensors(self) -> list[Tensor]:
        """Further tensors of a step that must be finite. They are averaged over processes, in place."""
        return []

    def _take_step_(self) -> None:
        """Called before the optimizer's step if everything is finite."""

    def _forget_step_(self) -> None:
        """Called if something is not finite, and the step is skipped."""

    # ---- the decision ------------------------------------------------------------------------------------------------
    def _skipped(self) -> SkippedSteps:
        # Not kept in an attribute: a Trainer with restore_callback_states_from_checkpoint makes the callback anew.
        return next(each for each in self.callback_handler.callbacks if isinstance(each, SkippedSteps))

    def _finish_backward_(self) -> None:
        """Decide, in all processes alike, whether to take a step: after its backward passes, before the optimizer."""
        tensors = [*self._step_tensors(), self._step_loss, self._grad_norm]
        average_over_processes_(tensors, self.accelerator)
        # One tensor, so that the device is asked once per step.
        values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        if values.isfinite().all():  # the values are averages, so all processes decide the same
            self._take_step_()
            self._skipped().in_a_row = 0
        else:
            self._skip_step_()
        self._step_loss.zero_()

    def _skip_step_(self) -> None:
        skipped, step = self._skipped(), self.state.global_step + 1
        skipped.total, skipped.in_a_row = skipped.total + 1, skipped.in_a_row + 1
        found = f"loss {float(self._step_loss):g}, norm of the gradients {float(self._grad_norm):g}"
        logger.warning(f"Step {step} is skipped: {found}.")
        self._forget_step_()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # optimizers skip parameters without a gradient: no decay, no momentum
        # DeepSpeed steps inside its backward pass, before this is called, so nothing can be undone there.
        if self.is_deepspeed_enabled or skipped.in_a_row >= self.max_nonfinite_steps:
            kept = "None of them changed the model or the last checkpoint."
            if self.is_deepspeed_enabled:
                kept = "DeepSpeed has taken the step; the last checkpoint is from before it."
            raise NonFiniteError(
                f"{skipped.in_a_row} steps in a row, up to step {step}, had a loss or gradients that are not finite "
                f"({found}). {kept} Lower the learning rate, look at the data, or train in float32; "
                "dms.max_nonfinite_steps sets how many such steps are skipped."
            )


class SkippedSteps(TrainerCallback, ExportableState):
    """The number of skipped steps. It is part of `trainer_state.json`, and so of every checkpoint."""

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total, "in_a_row": self.in_a_row}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # Trainer restores callbacks only if restore_callback_states_from_checkpoint is set, and it fails to save one
        # that the state of an older checkpoint does not name.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        vars(self).update(saved["attributes"])


class _BeforeOptimizer(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer._finish_backward_()
