"""Checks of a recipe against its model and data, before any weight is loaded; and the objects that its stages share."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..archs.bind import bind
from ..archs.plain_view import with_adapters
from ..archs.registry import chooses_queries, spec_for
from ..checkpoint.folders import check_place
from ..checkpoint.hub import check_not_base, check_repo_id, check_token
from ..checkpoint.stored import hub_weights, missing_weights
from ..config import SEARCH
from ..cut.plans import levels_above
from ..errors import HfDmsError
from ..gating.gates_for import build_gates
from ..gating.outcome import gap_in_words
from ..gating.rounding import round_sizes
from ..gating.share import with_share
from ..measure.precision import slow_bfloat16
from ..refit.repairable import check_one_stack, check_repairable
from ..report.card import base_metadata
from ..report.report import Original
from ..strategies.one_shot import check_choice
from ..tasks.data import is_data_file
from ..tasks.evaluate import evenly_spaced
from ..tasks.labels import SHOWN
from ..tasks.registry import TASKS, load_examples, load_more_examples
from ..tasks.task import Examples
from ..training.trainer import check_training_arguments
from .objects import (
    empty_model,
    load_model_config,
    load_processor,
    lora_config,
    model_class,
    packing,
    steps_of,
    training_arguments,
)
from .recipe import Recipe, saying_where
from .recover import with_recover_defaults
from .supernets import in_supernet, search_is_long

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A checked recipe, and the objects that its stages need.

    Attributes:
        recipe: the recipe, with all values of its `recover` section (recover.py) and its target as a fraction.
        config: the config of the dense model or supernet, with the changes that the examples need (labels).
        processor: the tokenizer or image processor.
        examples: the data of search, repair and measuring. Texts that the dense model writes are added in own_data.py.
        texts: further examples to measure on, by name (eval.texts).
        recover_examples: the data of the training after the cut.
        arguments: `TrainingArguments` of the recipe's stages: finetune, search, recover.
        original: with a supernet, the costs of the model at model.path, and the requested `target` as a share of them.
        lora: `peft.LoraConfig` of the search ("lora") and of the training after the cut ("recover.lora"), or None.
    """

    recipe: Recipe
    config: Any
    processor: Any
    examples: Examples
    texts: Mapping[str, Any]
    recover_examples: Examples
    arguments: Mapping[str, Any]
    lora: Mapping[str, Any]
    original: Original | None = None

    @property
    def held_out(self) -> Any:
        """The held-out examples that the recipe measures on."""
        return evenly_spaced(self.examples.held_out, self.recipe.eval.examples or self.recipe.task.num_held_out)


def unfinished_folder(recipe: Recipe) -> Path:
    """The working folder of a run until its result is written: `OUTPUT.unfinished`."""
    output = Path(recipe.output.path)
    return output.with_name(output.name + ".unfinished")


def prepare(recipe: Recipe, folder: Path | None = None) -> Prepared:
    """Check a recipe against the model and the data, without loading weights.

    Args:
        recipe: the recipe.
        folder: folder for the checkpoints of its stages. Default: `unfinished_folder`.

    Raises:
        ValueError: the recipe has a mistake; the message is about the first one.
    """
    folder = unfinished_folder(recipe) if folder is None else folder
    if recipe.hub.repo_id is not None:
        _check_hub(recipe, recipe.hub.repo_id)
    # In the order of cost: names and folders, the config, the data (which may take minutes to read), weight files last.
    check_place(recipe.output.path, sources_of(recipe))
    arguments = {"search": training_arguments(recipe, "train", folder / "search")}
    check_training_arguments(arguments["search"])
    if recipe.finetune:
        arguments["finetune"] = training_arguments(recipe, "finetune", folder / "finetune")
    if recipe.model.quantization:
        # Only to learn whether bitsandbytes is installed; the dtype is known later.
        packing(recipe, torch.float32)
    config = load_model_config(recipe)
    _check_task(recipe, config)
    _check_attention(recipe, config)
    processor, new_head = load_processor(recipe), recipe.dms.pipeline == "np"
    examples = load_examples(recipe.data.without_own_texts(), recipe.task, processor, config, new_head=new_head)
    if recipe.dms.strategy == SEARCH:
        recipe.dms.check_length(steps_of(arguments["search"], len(examples.train)))
    _check_classes(recipe, config, examples)
    recover_examples = examples
    if recipe.recover.data is not None:
        with saying_where("recover."):
            recover_examples = load_more_examples(recipe.recover.data, recipe.task, processor, config, examples)
    texts = load_texts(recipe, "eval.texts", recipe.eval.texts, processor, config, examples)
    config.update(examples.config)  # before any model is built: the number of classes decides the size of the head
    original = None
    if recipe.model.supernet is not None:
        recipe, config, original = in_supernet(recipe, empty_model(recipe, config))
    empty = empty_model(recipe, config)
    bound = bind(spec_for(config), empty)
    # From here on the target is a fraction, whatever the recipe gave: lengths follow from the share that is cut.
    recipe = dataclasses.replace(recipe, dms=with_share(recipe.dms, bound, empty))
    _check_sizes(recipe)
    recipe = with_recover_defaults(recipe, empty, recover_examples, arguments["search"].world_size)
    if recipe.recover.train is not None:
        arguments["recover"] = training_arguments(recipe, "recover", folder / "recover")
    _check_model(recipe, config)
    if notice := slow_bfloat16(_asking_for_bfloat16(recipe, config, arguments)):
        logger.warning(notice)
        recipe = _without_bfloat16(recipe)
        # `TrainingArguments` fix their precision when they are made, so they are made again.
        for stage, made in arguments.items():
            section = "train" if stage == "search" else stage
            arguments[stage] = training_arguments(recipe, section, Path(made.output_dir))
    if long := search_is_long(recipe, arguments, examples, recover_examples):
        logger.warning(long)
    lora = {section: lora_config(recipe, section) for section in ("lora", "recover.lora")}
    _check_adapters(recipe, config, lora)
    return Prepared(recipe, config, processor, examples, texts, recover_examples, arguments, lora, original)


def _check_hub(recipe: Recipe, repo_id: str) -> None:
    """Check that the result can be pushed, and that the push would not replace the dense model."""
    check_repo_id(repo_id)
    path, base = recipe.model.path, recipe.model.base
    if Path(path).is_dir():
        check_not_base(repo_id, recipe.hub.revision, base or base_metadata(path).get("base_model"))
    else:
        check_not_base(repo_id, recipe.hub.revision, base or path, recipe.model.revision)
    check_token()


def load_texts(
    recipe: Recipe, key: str, files: Mapping[str, str], processor: Any, config: Any, examples: Examples
) -> dict[str, Any]:
    """Examples of further files to measure on, by name; as many as of the held-out data.

    Args:
        recipe: the recipe; its data section says how files are read.
        key: the key of the recipe that names them, for errors.
        files: path by name.
        processor: the tokenizer or image processor.
        config: the model's config.
        examples: the examples of the recipe's own data.

    Raises:
        ValueError: a file cannot be read, or does not fit the model.
    """
    found = {}
    for name, path in files.items():
        try:
            # The file is for measuring only: nothing is held out of it, and nothing mixed in.
            data = dataclasses.replace(recipe.data, path=path, held_out=path, mix={})
            if is_data_file(path):
                data.split = "train"  # another file need not have the split of data.path
            other = load_more_examples(data, recipe.task, processor, config, examples)
        except HfDmsError as error:
            reason = re.sub("data.(path|held_out): ", "", str(error))  # these keys are ours here, not the user's
            raise HfDmsError(f"{key}.{name}: {reason}") from error
        found[name] = evenly_spaced(other.held_out, recipe.eval.examples or recipe.task.num_held_out)
    return found


def sources_of(recipe: Recipe) -> list[str]:
    """The paths or Hub ids of everything that a recipe reads: the model and the data."""
    data = [recipe.data] if recipe.recover.data is None else [recipe.data, recipe.recover.data]
    held_out = [each.held_out for each in data if isinstance(each.held_out, str)]
    texts = [*recipe.eval.texts.values(), *recipe.compare.texts.values()]
    return [recipe.model.path, *(each.path for each in data), *held_out, *recipe.data.mix, *texts]


def _asking_for_bfloat16(recipe: Recipe, config: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Keys of a recipe that make a CPU compute in bfloat16."""
    if arguments["search"].device.type != "cpu":
        return []
    dtype = str(config.dtype).removeprefix("torch.") if recipe.model.dtype == "auto" else recipe.model.dtype
    keys = {"finetune": "finetune.bf16", "search": "train.bf16", "recover": "recover.bf16"}
    found = [key for stage, key in keys.items() if stage in arguments and arguments[stage].bf16]
    return found + (["model.dtype"] if dtype == "bfloat16" else [])


def _without_bfloat16(recipe: Recipe) -> Recipe:
    """A recipe without bf16, so that training computes in the precision of the weights."""
    given: tuple[Any, ...] = (recipe.train, recipe.finetune, recipe.recover.train)
    train, finetune, recover = (each | {"bf16": False} if each and "bf16" in each else each for each in given)
    return dataclasses.replace(
        recipe, train=train, finetune=finetune, recover=dataclasses.replace(recipe.recover, train=recover)
    )


def _check_task(recipe: Recipe, config: Any) -> None:
    """Check that there is a model of this type for the task."""
    can_cache = spec_for(config).cache is not None
    if type(config) not in model_class(recipe)._model_mapping or (recipe.task.generates and not can_cache):
        raise HfDmsError(
            f"model.task: there is no {recipe.model.task} model of type '{config.model_type}'. "
            f"Tasks are {', '.join(TASKS)}."
        )


def _check_classes(recipe: Recipe, config: Any, examples: Examples) -> None:
    """Check that a detector whose base model scores classes, to choose its queries, keeps their number."""
    count = len(examples.labels)
    if chooses_queries(config) and recipe.dms.pipeline != "np" and count != config.num_labels:
        raise HfDmsError(
            f"model.path: a {config.model_type} scores classes in its base model too, whose weights are for "
            f"{config.num_labels}, and the data has {count}: {', '.join(examples.labels[:SHOWN])}. Load it in "
            "transformers with their id2label and ignore_mismatched_sizes=True, save it, and give that folder with a "
            "finetune section."
        )


def _check_model(recipe: Recipe, config: Any) -> None:
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


def _check_sizes(recipe: Recipe) -> None:
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


def _check_adapters(recipe: Recipe, config: Any, lora: Mapping[str, Any]) -> None:
    for section, adapters in lora.items():
        if adapters is not None:
            model = empty_model(recipe, config)
            try:
                with torch.device("meta"):
                    with_adapters(model, adapters, seed=0)
            except ValueError as error:  # ours or PEFT's
                raise HfDmsError(f"{section}: {error}") from error


def _check_attention(recipe: Recipe, config: Any) -> None:
    """Check that transformers has the attention that the recipe names, for this model and on this machine."""
    if recipe.model.attn_implementation is None:
        return
    try:
        with torch.device("meta"):
            cls = model_class(recipe)
            cls.from_config(copy.deepcopy(config), attn_implementation=recipe.model.attn_implementation)
    except (ValueError, ImportError) as error:
        raise HfDmsError(f"model.attn_implementation: {str(error).strip().splitlines()[0]}") from error
