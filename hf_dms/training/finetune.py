"""Ordinary training: of the dense model before a search, or of the pruned model after it, with or without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..archs.plain_view import base_model_of, with_adapters
from ..archs.registry import chooses_queries, scores_classes_alone
from ..config import DMSConfig
from ..tasks.task import Examples
from .detectors import box_distance, sigmoid_divergence
from .distillation import DistillationConfig
from .distributed import check_plugin, unshard_
from .exact_resume import ExactCheckpointsMixin, loss_is_summed_over_micro_batches, train_or_resume_
from .progress import show_progress_
from .step_guard import FiniteStepsMixin
from .taught import LOGITS, keep_logits_, without_labels


def train_(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    examples: Examples,
    teacher: PreTrainedModel | None = None,
    distillation: DistillationConfig | None = None,
    *,
    lora: Any = None,
    float32: bool = False,
    stage: str = "training",
    max_nonfinite_steps: int = DMSConfig.max_nonfinite_steps,
    keep: bool = False,
) -> None:
    """Train a model, in place, or resume from the last checkpoint of an earlier run. It ends in evaluation mode.

    Args:
        model: the model. All of its weights train, unless `lora` is given.
        arguments: the Trainer's arguments.
        examples: the training data. An example must be the same each time (see taught.py) if there is a teacher.
        teacher, distillation: the dense model, and its weight and temperature.
        lora: `peft.LoraConfig` of adapters that train in place of the weights. They are merged at the end.
        float32: whether weights in half precision are trained in float32, and rounded back at the end.
        stage: name of the training in progress messages.
        max_nonfinite_steps: number of steps in a row with a loss or gradients that are not finite, which ends it.
        keep: whether the final state is saved in the Trainer's folder, see `train_or_resume_`.

    Raises:
        NonFiniteError: there were that many such steps.
    """
    # In half precision, steps of a small learning rate are below the resolution of a weight, and rounding drops them.
    precisions = {name: parameter.dtype for name, parameter in model.named_parameters()} if float32 else {}
    if float32:
        model.float()
    trained: Any = model if lora is None else with_adapters(model, lora, arguments.seed)
    use_cache = getattr(model.config, "use_cache", None)
    trainer: Any = DistillationTrainer(
        model=trained,
        args=arguments,
        train_dataset=examples.train,
        data_collator=examples.collate,
        teacher=teacher,
        distillation=distillation,
        max_nonfinite_steps=max_nonfinite_steps,
    )
    check_plugin(trainer.accelerator, trained)
    show_progress_(trainer, stage)
    train_or_resume_(trainer, keep)
    if use_cache is not None:
        model.config.use_cache = use_cache  # the Trainer switched it off
    # For mixed precision accelerate has replaced `forward`; the model would go on computing under autocast.
    trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    if lora is not None:
        # The result can be dropped: PEFT puts the plain maps back into `model` itself.
        trained.merge_and_unload()
        model.requires_grad_(True)  # PEFT froze the base weights
    unshard_(model, arguments.device)
    for name, dtype in precisions.items():
        # One by one: some classes keep parts in float32 (`_keep_in_fp32_modules`), which `model.to` would round too.
        model.get_parameter(name).data = model.get_parameter(name).data.to(dtype)
    model.eval()


class DistillationTrainer(FiniteStepsMixin, ExactCheckpointsMixin, Trainer):
    """A Trainer with the loss (1 - w)·loss + w·T²·KL(teacher / T ‖ student / T), if there is a teacher.

    `divergence` says what the KL is for a detector.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        distillation: DistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)

    def get_train_dataloader(self):
        """Where the teacher's logits can be kept, they are computed first."""
        # Not in `__init__`: a training that is finished is only loaded, and needs no logits.
        if self.teacher is not None:
            keep_logits_(self)
        return super().get_train_dataloader()

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if LOGITS not in columns:
            columns.append(LOGITS)  # or `remove_unused_columns` takes them out of the examples

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        teacher, distillation = self.teacher, self.distillation
        kept = inputs.pop(LOGITS, None)
        if not model.training or teacher is None or distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if distillation.weight == 1:  # the loss on the labels does not count, so its memory is saved
            loss, outputs = torch.zeros((), device=self.args.device), model(**without_labels(inputs))
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            taught = {"logits": kept} if kept is not None else teacher(**without_labels(inputs))
        summed = loss_is_summed_over_micro_batches(self, num_items_in_batch)
        # The divergence is a mean over this micro-batch, and the summed losses are parts of the step's mean.
        share = 1 / self.current_gradient_accumulation_steps if summed else 1.0
        weight, temperature = distillation.weight, distillation.temperature
        student = self.accelerator.unwrap_model(model)
        distance = divergence(student, outputs, taught, temperature, inputs["labels"])
        loss = (1 - weight) * loss + weight * share * distance
        return (loss, outputs) if return_outputs else loss


def divergence(
    model: Any, student: Mapping[str, Any], teacher: Mapping[str, Any], temperature: float, labels: Any
) -> Tensor:
    """How far the outputs of a model are from its teacher's: a float32 scalar.

    `distillation_loss` of the logits; for a detector plus `box_distance`. A detector that gives each class a
    probability of its own has `sigmoid_divergence`.

    Args:
        model: the student; a causal one predicts the label of the next position.
        student, teacher: the outputs of both, with `logits`, and `pred_boxes` of a detector.
        temperature: that of the logits.
        labels: see `distillation_loss`.
    """
    base: Any = base_model_of(model)
    if "pred_boxes" in student and scores_classes_alone(base.config):
        return sigmoid_divergence(student, teacher, temperature, chooses_queries(base.config))
    logits = student["logits"], teacher["logits"]
    classes = distillation_loss(*logits, temperature, labels, shifted=base.can_generate())
    return classes + box_distance(student, teacher)


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, labels: Any = None, shifted: bool = False
) -> Tensor:
    """T²·KL(teacher / T ‖ student / T), mean over predictions: a float32 scalar.

    Args:
        student, teacher: logits `[..., classes]`.
        temperature: T.
        labels: `[...]`; predictions with label -100 do not count. If no label counts, the loss is 0. With labels of
            another shape, such as the boxes of a detector, all predictions count.
        shifted: whether position i predicts the label of position i + 1, as in a causal language model.

    Examples:
        >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986]]), 1.0)
        tensor(0.1308)
    """
    log_student = F.log_softmax(student.float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1)
    # Summed over classes, not averaged: the KL of one prediction.
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
    if isinstance(labels, Tensor) and labels.shape == divergence.shape:
        # Position i predicts the token at i + 1, so the last position has no label.
        if shifted:
            divergence, labels = divergence[..., :-1], labels[..., 1:]
        divergence = divergence[labels != -100]
    # T² because the gradients of softened targets shrink as 1/T² (Hinton et al., section 2); the weight then means the
    # same at every T.
    return temperature**2 * divergence.sum() / max(divergence.numel(), 1)
