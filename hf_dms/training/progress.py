"""Progress of every stage: a bar in a terminal, lines in a log file. Both show the stage and the remaining time."""

from __future__ import annotations

import re
import sys
import time
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from .distributed import is_main, print_on_main

SECONDS_PER_LINE = 5  # between two lines of work that is not training and has no logs of its own
SHOWN = ("resource", "target")  # logged values that are shown beside the loss
# With several sets to evaluate on, each name has that of its set in it: eval_NAME_loss.
EVALUATED = re.compile("eval_(.+_)?(loss|resource)")


def show_progress_(trainer: Any, stage: str) -> None:
    """Replace a Trainer's own progress bar or printer by `ProgressBar` or `ProgressLines`.

    Args:
        trainer: a Trainer. One that has neither (as in a notebook) is not changed.
        stage: its work in one word, such as search.
    """
    if trainer.pop_callback(ProgressCallback) or trainer.pop_callback(PrinterCallback):
        bar = sys.stderr.isatty() and not trainer.args.disable_tqdm
        trainer.add_callback(ProgressBar(stage) if bar else ProgressLines(stage))


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, showing loss, resource and target instead of printing every log."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description_str(self.stage)
            self.training_bar.initial = self.training_bar.n = state.global_step  # steps of the run before a resume
            # Else the bar would count the steps before the resume a second time.
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "learning_rate" in logs:
            self.training_bar.set_postfix_str(_numbers(logs))


class ProgressLines(PrinterCallback):
    """One line per log, evaluation and checkpoint: stage, step, time left, loss, resource and target.

    The time left assumes the mean pace of this process so far, evaluations and checkpoints included.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step
        resumed = f", going on after step {state.global_step}" if state.global_step else ""
        self._print(state, f"{state.max_steps} steps{resumed}")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # The mark of a training log. Its loss is missing where it was not finite (step_guard.py).
        if "learning_rate" in logs:
            elapsed, done = time.monotonic() - self.began, state.global_step - self.first_step
            left = elapsed / max(done, 1) * (state.max_steps - state.global_step)
            self._print(state, f"{_at(state)}, {timedelta(seconds=round(left))} left: {_numbers(logs)}")
        elif any(map(EVALUATED.fullmatch, logs)):
            self._print(state, f"{_at(state)}, evaluated: {_numbers(logs)}")

    def on_save(self, args, state, control, **kwargs) -> None:
        self._print(state, f"{_at(state)}, checkpoint saved")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._print(state, f"{_at(state)}, done in {timedelta(seconds=round(time.monotonic() - self.began))}")

    def _print(self, state, text: str) -> None:
        if state.is_world_process_zero:
            print(f"{self.stage}: {text}", flush=True)


class Countdown:
    """Progress of work that is not training, such as repair and measuring. Call it after each unit of the work.

    In a log file it prints a line every `SECONDS_PER_LINE` seconds, so short work prints nothing.

    Args:
        stage: the work, in a word or two.
        unit: what is counted, in the plural: layers, batches.
    """

    def __init__(self, stage: str, unit: str) -> None:
        self.stage, self.unit = stage, unit
        self.began = self.last_line = time.monotonic()
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` units of `total` are done."""
        if sys.stderr.isatty():
            self._show_bar(done, total)
            return
        now = time.monotonic()
        if now - self.last_line < SECONDS_PER_LINE:
            return
        self.last_line = now
        left = timedelta(seconds=round((now - self.began) / done * (total - done)))
        print_on_main(f"{self.stage}: {done} of {total} {self.unit} ({100 * done // total} %), {left} left")

    def _show_bar(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.stage, unit=f" {self.unit}", leave=False, disable=not is_main())
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()


def _at(state) -> str:
    if not state.max_steps:
        return "before any step"  # an evaluation of a Trainer that has not trained
    return f"step {state.global_step} of {state.max_steps} ({100 * state.global_step // state.max_steps} %)"


def _numbers(logs: dict[str, float]) -> str:
    """The numbers of a log to show: loss (the task's, if it is logged separately), resource, target, evaluations."""
    shown = {"loss": logs.get("task_loss", logs.get("loss"))} | {name: logs.get(name) for name in SHOWN}
    shown |= {name: value for name, value in logs.items() if EVALUATED.fullmatch(name)}
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
