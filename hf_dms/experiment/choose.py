"""Structure chosen without a search, for `dms.strategy` of a recipe and for the strategies of a comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ..cut.prune import prune
from ..gating.attach import attach_
from ..refit.batch_norms import BATCHES, estimate_batch_norms_
from ..strategies.one_shot import choose_, criterion_of
from ..tasks.task import Examples
from ..training.progress import Countdown
from .recipe import Recipe


class Batches(Sequence):
    """Batches of the first training examples. Each batch is collated only when it is accessed.

    Args:
        examples: the examples.
        count: largest number of examples.
        size: examples per batch.
        device: device of the tensors.
    """

    def __init__(self, examples: Examples, count: int, size: int, device: torch.device | str = "cpu") -> None:
        self.examples, self.device = examples, device
        places = list(range(min(count, len(examples.train))))
        self.places = [places[start : start + size] for start in range(0, len(places), size)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = Batches(self.examples, 0, 1, self.device)
            part.places = self.places[index]
            return part
        batch = self.examples.collate([self.examples.train[place] for place in self.places[index]])
        return send_to_device(batch, self.device)


def shuffled(examples: Examples, seed: int) -> Examples:
    """The same examples, with the training examples shuffled by a seed."""
    order = torch.randperm(len(examples.train), generator=torch.Generator().manual_seed(seed)).tolist()
    return dataclasses.replace(examples, train=Subset(examples.train, order))


def examples_of(arguments: Any, examples: Examples) -> int:
    """Number of examples that a training with these arguments sees."""
    if arguments.max_steps > 0:
        return arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    return math.ceil(arguments.num_train_epochs * len(examples.train))


def cut_by_criterion(
    model: PreTrainedModel, recipe: Recipe, name: str, examples: Examples, count: int, size: int
) -> tuple[PreTrainedModel, int]:
    """Put gates on a model, in place, let a criterion choose its structure, and cut.

    Args:
        model: a dense model. Afterwards its gates hold the choice.
        recipe: the recipe, with the budget.
        name: name of the criterion.
        examples: its data; the first examples are used.
        count: number of examples that it may see, over all its passes.
        size: examples per batch.

    Returns:
        The pruned model, and the number of examples that were seen.
    """
    criterion = criterion_of(name)
    # A criterion that reads its data three times gets a third of the examples.
    used = min(max(count // criterion.passes, 1), len(examples.train)) if criterion.needs_data else 0
    attach_(model, recipe.dms)
    batches = Batches(examples, used, size, model.device)
    with _showing_progress(model, len(batches) * criterion.passes):
        choose_(model, name, batches)
    # One example is enough for the proof, which runs the model in up to float64.
    inputs = Batches(examples, 1, 1, model.device)[0]
    pruned = prune(model, inputs={key: value for key, value in inputs.items() if key != "labels"})
    estimate_batch_norms_(pruned, Batches(examples, BATCHES * size, size, model.device))
    return pruned, used * criterion.passes


@contextlib.contextmanager
def _showing_progress(model: PreTrainedModel, total: int) -> Iterator[None]:
    """Context: count the forward passes of a model, so that no criterion has to tell how far it is."""
    progress, done = Countdown("choosing", "batches"), 0

    def count(*_: Any) -> None:
        nonlocal done
        done = min(done + 1, total)
        progress(done, total)

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
