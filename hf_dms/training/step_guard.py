"""Steps whose loss or gradients are not finite: passed over, counted, and after too many in a row the end of a run.

What a search adds to a step (its Taylor terms, its ratios' gradient) it hands in through three hooks.
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

OverTrainer: Any = object  # a mixin over a Trainer, whose attributes it uses: Any to a type checker
logger = logging.get_logger(__name__)


class FiniteStepsMixin(OverTrainer):
    """Lets a Trainer take nothing of a step whose loss or gradients are not finite in any process.

    Args:
        max_nonfinite_steps: so many of them in a row end the run.

    Raises:
        NonFiniteError: in training, when they do.
    """

    def __init__(self, *args: Any, max_nonfinite_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_nonfinite_steps = max_nonfinite_steps
        self._step_loss = torch.zeros((), device=self.args.device)
        self._grad_norm = torch.zeros((), device=self.args.device)
        self.add_callback(SkippedSteps())
        self.add_callback(_BeforeOptimizer(self))

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped since the run began, before it was interrupted included."""
        return self._skipped().total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss += loss.detach()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._grad_norm = torch.as_tensor(0.0 if norm is None else norm, device=self.args.device).float()
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps
            bad = [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
            logs = {name: value for name, value in logs.items() if name not in bad}  # JSON has no such numbers
        super().log(logs, *args, **kwargs)

    # ---- hooks -------------------------------------------------------------------------------------------------------
    def _step_tensors(self) -> list[Tensor]:
        """What else of a step must be finite; averaged over processes, in place, in the same collective."""
        return []

    def _take_step_(self) -> None:
        """Called before the optimizer's step when all is finite."""

    def _forget_step_(self) -> None:
        """Called when it is not."""

    # ---- the decision ------------------------------------------------------------------------------------------------
    def _skipped(self) -> SkippedSteps:
        return next(each for each in self.callback_handler.callbacks if isinstance(each, SkippedSteps))

    def _finish_backward_(self) -> None:
        """After the backward passes of a step, before the optimizer's: what all processes must agree on."""
        tensors = [*self._step_tensors(), self._step_loss, self._grad_norm]
        average_over_processes_(tensors, self.accelerator)
        values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        if values.isfinite().all():  # averages, so all processes come to the same answer
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
                parameter.grad = None  # optimizers pass over parameters without a gradient: no decay, no momentum
        if self.is_deepspeed_enabled or skipped.in_a_row >= self.max_nonfinite_steps:
            kept = "The last checkpoint and the model hold nothing of them."
            if self.is_deepspeed_enabled:
                kept = "DeepSpeed has stepped by itself; the last checkpoint holds nothing of it."
            raise NonFiniteError(
                f"{skipped.in_a_row} steps in a row, up to step {step}, had a loss or gradients that are not finite "
                f"({found}). {kept} Lower the learning rate, look at the data, or train in float32; "
                "dms.max_nonfinite_steps says how many are passed over."
            )


class SkippedSteps(TrainerCallback, ExportableState):
    """How many steps were skipped: a part of `trainer_state.json`, and so of every checkpoint."""

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total, "in_a_row": self.in_a_row}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        vars(self).update(saved["attributes"])


class _BeforeOptimizer(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer._finish_backward_()
