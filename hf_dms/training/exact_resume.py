"""Exact resuming, for searches (trainer.py) and ordinary training (finetune.py).

A run that is killed at any moment and started again ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    SaveStrategy,
    rotate_checkpoints,
    sort_checkpoints,
)

from ..checkpoint.folders import replace_folder
from ..checkpoint.search_state import has_other_names, load_weights_
from .distributed import print_on_main
from .step_guard import OverTrainer

SAVING = "saving"  # folder for a checkpoint that is being written, inside the output folder


class ExactCheckpointsMixin(OverTrainer):
    """Makes a Trainer resume exactly, whenever it was killed.

    - A checkpoint gets its name only when all of its files are written.
    - Before each checkpoint a log is forced, and the events of an epoch's end run first: Trainer does not save the
      running sum of the loss, and a resumed Trainer skips those events.
    - Files of some architectures (ViT) hold other parameter names than the model. Trainer would skip these names with a
      warning and resume with the wrong weights, so they are loaded with `from_pretrained`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Behind the Trainer's own callbacks, because it changes what they decided about saving.
        self.add_callback(_CheckpointsLast())
        self._saving = False
        self._unwrapped_from: tuple[Any, Any] = (None, None)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, SAVING)) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, name = Path(self._get_output_dir(trial)), _name_at(self.state.global_step)
        if self.args.should_save:
            shutil.rmtree(folder / SAVING, ignore_errors=True)  # left by a run that was killed
        # No process may write into the folder before the main process has cleared it.
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        # Before the state is written once more: the state in the checkpoint must not name the temporary folder.
        self._name_best_checkpoint_(folder, name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(folder / SAVING / name / TRAINER_STATE_NAME))
            replace_folder(folder / name, folder / SAVING / name)
            (folder / SAVING).rmdir()
            # Trainer's own rotation looks into the temporary folder, where there is only one.
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint_(self, folder: Path, saved: str) -> None:
        """Record the best checkpoint under its final name. Trainer would record the temporary folder."""
        best = _name_at(self.state.best_global_step)
        if self.state.best_global_step and (best == saved or (folder / best).is_dir()):
            self.state.best_model_checkpoint = str(folder / best)

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
        # Several times a step; `unwrap_model` looks on the disk for DeepSpeed each time.
        if self._unwrapped_from[0] is not self.model:
            self._unwrapped_from = self.model, self.accelerator.unwrap_model(self.model)
        return self._unwrapped_from[1]


def train_or_resume_(trainer: Any, keep: bool = False) -> None:
    """Run a Trainer, from the last checkpoint in its folder if there is one. A finished run is only loaded.

    `Trainer.train` would take one more step after the last one.

    Args:
        trainer: a Trainer with `ExactCheckpointsMixin`.
        keep: whether the final state is saved (without the optimizer), whatever `save_strategy` is. The next call then
            only loads it.
    """
    if checkpoints := _checkpoints(trainer):
        state = TrainerState.load_from_json(str(Path(checkpoints[-1], TRAINER_STATE_NAME)))
        # `max_steps` of the run that wrote it: a recipe with another length is refused before
        # (experiment/unfinished.py).
        if state.global_step >= state.max_steps:
            print_on_main(f"This is finished already: its end is loaded from {checkpoints[-1]}.")
            # Callers read steps and logs from it, and only `train` would load it.
            trainer.state = state
            if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                trainer._load_best_model()
            else:
                trainer._load_from_checkpoint(checkpoints[-1])
            return
    trainer.train(resume_from_checkpoint=checkpoints[-1] if checkpoints else None)
    if keep and not any(Path(folder).name == _name_at(trainer.state.global_step) for folder in _checkpoints(trainer)):
        # The run is over, and nothing will resume from the optimizer's state, which is twice as large as the weights.
        trainer.args.save_only_model = True
        trainer._save_checkpoint(trainer.model, trial=None)


def _checkpoints(trainer: Any) -> list[str]:
    """The checkpoints in a Trainer's folder, oldest first.

    A checkpoint without a state file does not count: it was being removed (`save_total_limit`) when the run was killed.
    """
    folders = sort_checkpoints(str(trainer.args.output_dir))
    return [folder for folder in folders if Path(folder, TRAINER_STATE_NAME).is_file()]


def _name_at(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def loss_is_summed_over_micro_batches(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the losses of a step's micro-batches add up to its mean, as Trainer.training_step decides it."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # older versions of Trainer do not have it
    if scaled is not None:
        return scaled
    normalized_by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return normalized_by_model or trainer.compute_loss_func is not None


class _CheckpointsLast(TrainerCallback):
    """Moves a step's checkpoint behind everything else that belongs to the step: its log, and the end of an epoch."""

    def __init__(self) -> None:
        self.postponed = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # At the end of an epoch Trainer runs further events after the step's. A checkpoint in between would lose them.
        epoch_ends = control.should_training_stop or float(state.epoch).is_integer()
        self.postponed = epoch_ends and control.should_save
        may_save = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        if may_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        control.should_save &= not self.postponed

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        # With save_strategy epoch, Trainer asks for the checkpoint here: it forces a log as after any other step.
        postponed = self.postponed
        self.on_step_end(args, state, control)
        control.should_save |= postponed or self.postponed
        self.postponed = False
