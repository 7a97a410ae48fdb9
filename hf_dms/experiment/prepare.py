"""From a recipe to the objects that its stages share: all checks, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..checkpoint.folders import check_place
from ..config import SEARCH
from ..errors import HfDmsError
from ..gating.share import with_share
from ..measure.precision import slow_bfloat16
from ..report.report import Original
from ..tasks.data import is_data_file
from ..tasks.evaluate import evenly_spaced
from ..tasks.registry import load_examples, load_more_examples
from ..tasks.task import Examples
from ..training.trainer import check_training_arguments
from .checks import (
    check_attention,
    check_classes,
    check_hub,
    check_lora,
    check_model,
    check_sizes,
    check_task,
)
from .objects import (
    empty_model,
    load_model_config,
    load_processor,
    lora_config,
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
        check_hub(recipe, recipe.hub.repo_id)
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
    check_task(recipe, config)
    check_attention(recipe, config)
    processor, new_head = load_processor(recipe), recipe.dms.pipeline == "np"
    examples = load_examples(recipe.data.without_own_texts(), recipe.task, processor, config, new_head=new_head)
    if recipe.dms.strategy == SEARCH:
        recipe.dms.check_length(steps_of(arguments["search"], len(examples.train)))
    check_classes(recipe, config, examples)
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
    check_sizes(recipe)
    recipe = with_recover_defaults(recipe, empty, recover_examples, arguments["search"].world_size)
    if recipe.recover.train is not None:
        arguments["recover"] = training_arguments(recipe, "recover", folder / "recover")
    check_model(recipe, config)
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
    check_lora(recipe, config, lora)
    return Prepared(recipe, config, processor, examples, texts, recover_examples, arguments, lora, original)


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
