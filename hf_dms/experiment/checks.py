"""Checks of a recipe against its model. None loads a weight; prepare.py calls them in the order of their cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..archs.bind import bind
from ..archs.plain_view import with_adapters
from ..archs.registry import chooses_queries, spec_for
from ..checkpoint.hub import check_not_base, check_repo_id, check_token
from ..checkpoint.stored import hub_weights, missing_weights
from ..config import SEARCH
from ..cut.plans import levels_above
from ..errors import HfDmsError
from ..gating.gates_for import build_gates
from ..gating.outcome import gap_in_words
from ..gating.rounding import round_sizes
from ..refit.repairable import check_one_stack, check_repairable
from ..report.card import base_metadata
from ..strategies.one_shot import check_choice
from ..tasks.labels import SHOWN
from ..tasks.registry import TASKS
from ..tasks.task import Examples
from .objects import empty_model, model_class
from .recipe import Recipe

logger = logging.get_logger(__name__)


def check_hub(recipe: Recipe, repo_id: str) -> None:
    """Check that the result can be pushed, and that the push would not replace the dense model."""
    check_repo_id(repo_id)
    path, base = recipe.model.path, recipe.model.base
    if Path(path).is_dir():
        check_not_base(repo_id, recipe.hub.revision, base or base_metadata(path).get("base_model"))
    else:
        check_not_base(repo_id, recipe.hub.revision, base or path, recipe.model.revision)
    check_token()


def check_task(recipe: Recipe, config: Any) -> None:
    """Check that there is a model of this type for the task."""
    can_cache = spec_for(config).cache is not None
    if type(config) not in model_class(recipe)._model_mapping or (recipe.task.generates and not can_cache):
        raise HfDmsError(
            f"model.task: there is no {recipe.model.task} model of type '{config.model_type}'. "
            f"Tasks are {', '.join(TASKS)}."
        )


def check_classes(recipe: Recipe, config: Any, examples: Examples) -> None:
    """Check that a detector whose base model scores classes, to choose its queries, keeps their number."""
    count = len(examples.labels)
    if chooses_queries(config) and recipe.dms.pipeline != "np" and count != config.num_labels:
        raise HfDmsError(
            f"model.path: a {config.model_type} scores classes in its base model too, whose weights are for "
            f"{config.num_labels}, and the data has {count}: {', '.join(examples.labels[:SHOWN])}. Load it in "
            "transformers with their id2label and ignore_mismatched_sizes=True, save it, and give that folder with a "
            "finetune section."
        )


def check_model(recipe: Recipe, config: Any) -> None:
    """Check the request against the model without its weights, and the weight files against the model."""
    model = empty_model(recipe, config)
    bound = bind(spec_for(config), model)
    gates = build_gates(bound, model, recipe.dms, device=torch.device("cpu"))
    try:
        sizes = round_sizes(gates, bound, recipe.dms, config)
    except HfDmsError as error:
        of_what = "model.supernet: shares are of the supernet. " if recipe.model.supernet is not None else ""
        raise HfDmsError(f"{of_what}{error}") from error
    shrunk_alike = float(gates.resource(gates.dense_sizes() | sizes))  # a search may end nearer to its target
    if message := gap_in_words(shrunk_alike, recipe.dms):
        logger.warning(message)
    if recipe.dms.strategy != SEARCH:
        check_choice(recipe.dms, gates, bound)
    key = "recover.repair" if recipe.recover.repair is not None else "dms.search_over"
    if key == "recover.repair" or recipe.dms.search_over == "refitted":
        try:
            if recipe.dms.search_over == "refitted":
                check_one_stack(bound)
            check_repairable(model, bound)
        except HfDmsError as error:
            raise HfDmsError(f"{key}: {str(error).removeprefix('repair: ')}") from error
    check_weights(recipe, model)


def check_weights(recipe: Recipe, model: Any, download: bool = False) -> None:
    """Check that the weight files are complete, belong to the model, and hold all weights that are not trained first.

    Args:
        recipe: the recipe.
        model: the model to load, on the meta device.
        download: whether weights of a Hub id are downloaded. If not, they are checked only if the cache has all of
            them, and otherwise it is checked that the Hub has them.

    Raises:
        ValueError: they are not.
    """
    if recipe.dms.pipeline == "np":
        return
    path, local = recipe.model.path, Path(recipe.model.path).is_dir()
    try:
        folder = Path(path) if local else hub_weights(path, recipe.model.revision, download)
    except HfDmsError as error:
        raise HfDmsError(f"model.path: {error}") from error
    if folder is None:
        return
    try:
        missing = missing_weights(folder, model)
    except HfDmsError as error:
        if local:
            raise
        # The folder of the whole repository: weights lie in its snapshots/COMMIT.
        cache = folder.parents[1]
        raise HfDmsError(
            f"model.path: {error} If '{path}' is complete on the Hub, delete {cache}, and it is downloaded again."
        ) from error
    check_trained(recipe, missing)


def check_trained(recipe: Recipe, missing: Iterable[str]) -> None:
    """Check that weights which are missing in the files are trained before the search.

    Args:
        recipe: the recipe.
        missing: names of parameters that are not in the files.

    Raises:
        ValueError: they would have random values in the search.
    """
    if (names := sorted(missing)) and not recipe.finetune:
        raise HfDmsError(
            f"model.path: '{recipe.model.path}' has no weights for {', '.join(names)}, which would be random. Add a "
            "finetune section (finetune.max_steps or finetune.num_train_epochs) to train them before the search."
        )


def check_sizes(recipe: Recipe) -> None:
    """Check that the search passes the sizes in `output.sizes`."""
    if not recipe.output.sizes:
        return
    dms = recipe.dms
    if dms.strategy != SEARCH or dms.pipeline != "p-" or dms.target_schedule == "constant":
        raise HfDmsError(
            "output.sizes needs a search with frozen weights (pipeline p-) and a falling target: the plans of "
            "larger sizes are for the dense model's weights. Leave it out, or run one recipe per size."
        )
    there = levels_above(dms.target)
    for size in recipe.output.sizes:
        if not any(math.isclose(size, level) for level in there):
            raise HfDmsError(
                f"output.sizes has {size:g}, which the search does not pass. On its way to {dms.target:.4g} it passes "
                f"{', '.join(f'{level:g}' for level in there) or 'none'}."
            )


def check_lora(recipe: Recipe, config: Any, lora: Mapping[str, Any]) -> None:
    """Check that adapters fit the model; `lora` has `peft.LoraConfig` or None by section."""
    for section, adapters in lora.items():
        if adapters is not None:
            model = empty_model(recipe, config)
            try:
                with torch.device("meta"):
                    with_adapters(model, adapters, seed=0)
            except ValueError as error:  # ours or PEFT's
                raise HfDmsError(f"{section}: {error}") from error


def check_attention(recipe: Recipe, config: Any) -> None:
    """Check that transformers has the attention that the recipe names, for this model and on this machine."""
    if recipe.model.attn_implementation is None:
        return
    try:
        with torch.device("meta"):
            cls = model_class(recipe)
            cls.from_config(copy.deepcopy(config), attn_implementation=recipe.model.attn_implementation)
    except (ValueError, ImportError) as error:
        raise HfDmsError(f"model.attn_implementation: {str(error).strip().splitlines()[0]}") from error
