"""The memory that a recipe's least squares take beside the models, for `hf-dms validate`."""

from __future__ import annotations

import torch

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..config import SEARCH
from ..refit.memory import refitted_bytes, repair_bytes
from .objects import empty_model
from .prepare import Prepared

GIB = 2**30


def memory_in_words(prepared: Prepared) -> list[str]:
    """A line for the repair and a line for a search over refitted weights, for language models and text classifiers.

    Args:
        prepared: the recipe.
    """
    recipe, model = prepared.recipe, empty_model(prepared.recipe, prepared.config)
    bound, found = bind(spec_for(prepared.config), model), []
    # The formulas are for one stack of layers and tokens.
    if len(bound.stacks) > 1 or model.main_input_name != "input_ids":
        return []
    dtype = prepared.config.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    dims = frozenset(recipe.dms.prune or bound.spec.prunable)
    if (repair := recipe.recover.repair) is not None:
        examples = min(repair.examples, len(prepared.examples.train))
        itemsize = (dtype or torch.float32).itemsize
        sums, states = repair_bytes(bound, examples * recipe.data.sequence_length, itemsize, dims)
        found.append(f"memory of the repair: {_gib(sums)} for sums, {_gib(states)} for hidden states")
    if recipe.dms.strategy == SEARCH and recipe.dms.search_over == "refitted":
        found.append(f"memory of the search's refits: {_gib(refitted_bytes(bound, dims))}")
    return found


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
