"""The logits of a teacher for every training example, computed once where a training passes over them several times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .progress import Countdown

LOGITS = "teacher_logits"  # in an example, and in a batch
MOST_BYTES = 2**30  # of kept logits


class Taught(torch.utils.data.Dataset):
    """Training examples, each with the teacher's logits for it."""

    def __init__(self, rows: Any, logits: Tensor) -> None:
        self.rows, self.logits = rows, logits

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], LOGITS: self.logits[index]}


def keep_logits_(trainer: Any) -> None:
    """Add the teacher's logits to a distilling Trainer's training examples, in place, if that saves work.

    They are computed in the order of the examples, so that a resumed training gets the same numbers. An example must be
    the same each time that it is read: logits of one random crop would be wrong for the next one. Nothing is done
    for a single epoch, for several processes (each would compute all logits), for models with more than one prediction
    per example (their logits are too large to keep), or above `MOST_BYTES`.

    Args:
        trainer: the Trainer, with a `teacher`.
    """
    rows, collate, arguments = trainer.train_dataset, trainer.data_collator, trainer.args
    size, epochs = arguments.train_batch_size, arguments.num_train_epochs
    if arguments.max_steps > 0:
        epochs = arguments.max_steps * arguments.gradient_accumulation_steps * size / len(rows)
    if isinstance(rows, Taught) or epochs <= 1 or arguments.world_size > 1:
        return
    found: list[Tensor] = []
    progress = Countdown("teacher", "examples")
    for start in range(0, len(rows), size):
        batch = collate([rows[index] for index in range(start, min(start + size, len(rows)))])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = trainer.teacher(**without_labels(trainer._prepare_inputs(batch))).logits
        if logits.dim() != 2 or logits[0].numel() * logits.element_size() * len(rows) > MOST_BYTES:
            return
        found.append(logits.cpu())
        progress(start + len(logits), len(rows))
    trainer.train_dataset = Taught(rows, torch.cat(found))
    trainer.data_collator = functools.partial(_collate, collate)


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a model without labels, so that it computes logits and no loss."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def _collate(collate: Callable[[list], dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch with the logits of its examples, if they have any (held-out ones have none)."""
    if LOGITS not in rows[0]:
        return collate(rows)
    batch = collate([{name: value for name, value in row.items() if name != LOGITS} for row in rows])
    return {**batch, LOGITS: torch.stack([row[LOGITS] for row in rows])}
