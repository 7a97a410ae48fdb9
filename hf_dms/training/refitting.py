"""A callback of DMSTrainer for searches over refitted weights: when to refit, and on which examples.

The refits themselves are in refit/search.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import HfDmsError
from ..gating.rounding import round_sizes
from ..refit.search import RefittedSearch

REFRESHES = 3  # refits, evenly over the search; each costs about three forward passes over its examples
POSITIONS_PER_INPUT = 4  # tokens or patches to refit on, per input of the widest map
POSITIONS_TO_CHOOSE = 4 * POSITIONS_PER_INPUT  # the same for choosing the units of the cut, which happens once


class RefitCallback(TrainerCallback):
    """Refits when the warm-up ends, a few times after it, and when a search resumes from a checkpoint.

    At the end, the units are chosen once more, for the sizes of the cut and on more examples.

    Args:
        trainer: a DMSTrainer; its training data must be map-style, with labels.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.search: RefittedSearch | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        step, gates = state.global_step, self.trainer.gates
        due = step in refresh_steps(self.trainer.dms_config.warmup_steps, state.max_steps)
        # A resumed search knows the ratios of its last refit, but the refits are in no checkpoint: they are made again.
        if not due and (self.search is not None or gates.refit_ratio is None):
            return
        if self.search is None:
            self.search = RefittedSearch(self.trainer._unwrapped(), examples_to_refit_on(self.trainer))
        self.search.refresh_(None if due else gates.refit_ratio)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        model, gates = self.trainer._unwrapped(), self.trainer.gates
        if gates.num_updates:
            search = self.search or RefittedSearch(model, examples_to_refit_on(self.trainer))
            sizes = round_sizes(gates, gates.attachment.bound, gates.attachment.config, model.config)
            search.choose_units_(sizes, examples_to_refit_on(self.trainer, POSITIONS_TO_CHOOSE))
        self.search = None


def refresh_steps(warmup_steps: int, max_steps: int) -> list[int]:
    """The steps before which a search refits."""
    length = max(max_steps - warmup_steps, 0)
    return sorted({warmup_steps + length * number // REFRESHES for number in range(REFRESHES)})


def examples_to_refit_on(trainer: Any, positions_per_input: int = POSITIONS_PER_INPUT) -> list[dict[str, Tensor]]:
    """Batches of the training data. Every call returns the same ones, so that a resumed search refits to the same.

    Args:
        trainer: the trainer with the data.
        positions_per_input: number of tokens or patches per input of the widest map; fewer if the data ends.

    Raises:
        ValueError: the data is not a map-style dataset.
    """
    data = trainer.train_dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise HfDmsError(
            f"dms.search_over = refitted needs a dataset with a length and an index, got a {type(data).__name__}. "
            "Use search_over: masks for streamed data."
        )
    bound = trainer.gates.attachment.bound
    widest = max(bound.product(axis) for param in bound.params.values() for axis in param.axes[1:] if param.layer == 0)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    # A generator of its own: a refit must not change what the search draws from torch's global one.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    batches: list[dict[str, Tensor]] = []
    # Least squares need several positions per unknown, and the widest map has the most.
    missing, size = positions_per_input * widest, trainer.args.per_device_train_batch_size
    # Some collators draw random numbers (masked language models).
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the accelerators, for good
        for start in range(0, len(order), size):
            batch = collate([data[i] for i in order[start : start + size]])
            batches.append(
                {name: value for name, value in batch.items() if isinstance(value, Tensor) or name == "labels"}
            )
            missing -= _positions(batch, bound)
            if missing <= 0:
                break
    return batches


def examples_beside_the_steps(trainer: Any) -> int:
    """Examples seen outside the search's steps: for each refit, for the gradients, and to choose the units."""
    if trainer.dms_config.search_over != "refitted":
        return 0
    refit, choose = (
        sum(len(next(iter(batch.values()))) for batch in examples_to_refit_on(trainer, positions))
        for positions in (POSITIONS_PER_INPUT, POSITIONS_TO_CHOOSE)
    )
    return (REFRESHES + 1) * refit + choose


def _positions(batch: dict[str, Tensor], bound: Any) -> int:
    """Tokens or patches of a batch."""
    if "input_ids" not in batch:
        return len(next(iter(batch.values()))) * bound.product(bound.spec.tokens)
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
