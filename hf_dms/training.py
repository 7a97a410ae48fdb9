"""What a search (trainer.py) and an ordinary training (retrain.py) ask of a Trainer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import has_other_names, load_weights_


class ExactCheckpointsMixin:
    """Lets a Trainer resume models whose files hold other names than they do, such as ViT.

    `Trainer` passes over names that it does not find with a warning, and goes on with the weights that it has.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        loaded = self._unwrapped()
        if isinstance(loaded, PreTrainedModel) and has_other_names(loaded, resume_from_checkpoint):
            load_weights_(loaded, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best, loaded = self.state.best_model_checkpoint, self._unwrapped()
        if isinstance(loaded, PreTrainedModel) and has_other_names(loaded, best):
            load_weights_(loaded, best)
        else:
            super()._load_best_model()

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


def train_or_resume_(trainer: Any) -> None:
    """Run a Trainer, from the last checkpoint in its folder if there is one; a finished run is only loaded.

    `Trainer.train` would add a step to a run that had reached its last one.
    """
    folder = str(trainer.args.output_dir)
    checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def loss_is_summed_over_micro_batches(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the losses of a step's micro-batches add up to its mean, as Trainer.training_step decides it."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # older Trainers do not have it
    if scaled is not None:
        return scaled
    normalized_by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return normalized_by_model or trainer.compute_loss_func is not None


class SearchProgress(ProgressCallback):
    """The Trainer's progress bar, showing loss, resource and target instead of printing every log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            shown = {"loss": logs.get("task_loss", logs["loss"])}  # a retraining has no resource and no target
            shown |= {name: logs[name] for name in ("resource", "target") if name in logs}
            self.training_bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in shown.items()))


def show_losses_(trainer: Any) -> None:
    """Let a Trainer's progress bar show what `SearchProgress` says, if it has one."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SearchProgress())
