"""`model.supernet` of a recipe: the larger config, the target in it, and a check of the length of its search."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..archs.registry import spec_for
from ..config import RESOURCES, amount
from ..errors import HfDmsError
from ..gating.supernet import dense_resource, supernet_config, target_in
from ..report.numbers import COSTS
from ..report.report import Original
from ..tasks.task import Examples
from .choose import examples_of
from .recipe import Recipe

SEARCH_SHARE = 0.1  # longest search, as a share of the training after it: the paper's pipelines np and p


def in_supernet(recipe: Recipe, original: PreTrainedModel) -> tuple[Recipe, PreTrainedConfig, Original]:
    """A recipe that searches in a larger network than the model at model.path.

    Args:
        recipe: a recipe with `model.supernet`.
        original: the model at model.path, on the meta device.

    Returns:
        The recipe with its target as a share of the supernet's resource; the supernet's config; and the original's
        costs by their keys in a report, with the requested `target` as a share of the original's resource.

    Raises:
        ValueError: the architecture cannot have these sizes, or the target is above the supernet's resource.
    """
    dms, larger = recipe.dms, recipe.model.supernet
    assert larger is not None
    try:
        config = supernet_config(original.config, dms, larger.width, larger.depth)
    except HfDmsError as error:
        raise HfDmsError(f"model.{error}" if str(error).startswith("supernet") else str(error)) from error
    with torch.device("meta"):
        network = type(original)._from_config(copy.deepcopy(config))
    # Encoders and image models have no key-value cache to count.
    counted = [name for name in RESOURCES if name != "kv_bytes" or spec_for(config).cache is not None]
    costs: Any = {
        COSTS[name]: int(dense_resource(original, dataclasses.replace(dms, resource=name, resource_scope="model")))
        for name in counted
    }
    asked = amount(dms.target) / dense_resource(original, dms) if isinstance(dms.target, str) else dms.target
    target = target_in(dms, original, network)
    found: Original = costs | {"target": asked}
    return dataclasses.replace(recipe, dms=dataclasses.replace(dms, target=target)), config, found


def search_is_long(
    recipe: Recipe, arguments: Mapping[str, Any], examples: Examples, recover_examples: Examples
) -> str | None:
    """A warning if a search of pipeline np takes more than a tenth of the training after it; None otherwise.

    Args:
        recipe: the recipe.
        arguments: `TrainingArguments` of its stages.
        examples: the data of the search.
        recover_examples: the data of the training after the cut.
    """
    if recipe.dms.pipeline != "np":
        return None
    if "recover" not in arguments:
        return (
            "Pipeline np without a recover section ends with the weights of a short search. Add recover: {}, which "
            "trains the shape that was found from fresh weights, for ten times as long as the search."
        )
    seen, trained = examples_of(arguments["search"], examples), examples_of(arguments["recover"], recover_examples)
    # A search of exactly a tenth must not be warned of because of a rounding error.
    if seen <= SEARCH_SHARE * trained * (1 + 1e-6):
        return None
    return (
        f"The search sees {seen:,} examples and the training after the cut {trained:,}. In the paper a search takes at "
        "most a tenth of that: lower train.max_steps or train.num_train_epochs, or raise that of recover."
    )
