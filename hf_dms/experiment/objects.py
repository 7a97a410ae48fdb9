"""The objects of transformers, peft and bitsandbytes that the sections of a recipe describe."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available

from ..errors import HfDmsError
from ..files import load_saved
from .recipe import Recipe
from .sections import check_seed
from .values import coerce_fields


def training_arguments(recipe: Recipe, section: str, output_dir: Path) -> Any:
    """The `TrainingArguments` of the search, or of the training before or after it.

    Args:
        recipe: the recipe.
        section: train, finetune or recover. The last two inherit the values of train, except length and evaluations.
        output_dir: folder for checkpoints.

    Raises:
        ValueError: unknown keys or bad values.
    """
    given = recipe.train
    if section != "train":
        own = recipe.finetune if section == "finetune" else recipe.recover.train or {}
        given = {key: value for key, value in given.items() if not _is_of_a_search(key, value)} | own
        if own.get("eval_strategy") not in (None, False, "no") or own.get("load_best_model_at_end"):
            raise HfDmsError(
                f"{section}.eval_strategy, {section}.load_best_model_at_end: there is no evaluation during this "
                "training; the model is measured after it. Leave them out. In the search, train.eval_strategy works."
            )
    if "output_dir" in given:
        raise HfDmsError(f"{section}.output_dir: the output folder is output.path.")
    for key in ("push_to_hub", "hub_token"):
        if key in given:  # the recipe is part of what is pushed, token included; and checkpoints are not the result
            raise HfDmsError(f"{section}.{key}: give hub.repo_id, and the token by `hf auth login` or HF_TOKEN.")
    # One checkpoint is enough to resume from, and it is as large as the model with its optimizer's state.
    defaults: dict[str, Any] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 1}
    if not {"save_steps", "save_strategy", "load_best_model_at_end"} & given.keys():
        # A share of the steps: Trainer's own 500 steps are more than most searches have, so a killed one would be lost.
        defaults["save_steps"] = 0.25
    # torch warns of pinned memory where there is no accelerator.
    accelerated = torch.accelerator.is_available()
    defaults |= {"dataloader_pin_memory": accelerated, "use_cpu": not accelerated}  # bf16 on a CPU needs use_cpu
    values = defaults | coerce_fields(TrainingArguments, given, section)
    if values.get("max_steps", -1) <= 0 and "num_train_epochs" not in values:
        raise HfDmsError(f"{section}.max_steps is required (or {section}.num_train_epochs): its length.")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if values.get(key, 1) < 1:
            raise HfDmsError(f"{section}.{key} must be at least 1, got {values[key]}.")
    for key in ("seed", "data_seed"):
        if values.get(key) is not None:
            check_seed(values[key], f"{section}.{key}")
    try:
        return TrainingArguments(output_dir=str(output_dir), **values)
    except (ValueError, TypeError, ImportError) as error:
        raise HfDmsError(f"{section}: {error}") from error


def steps_of(arguments: Any, num_examples: int) -> int:
    """Optimizer steps of a training with these arguments."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return math.ceil(arguments.num_train_epochs * math.ceil(num_examples / per_step))


def _is_of_a_search(key: str, value: Any) -> bool:
    """Whether a key of `train` is only for the search: its length, evaluations."""
    evaluation = ("do_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    best = key == "save_strategy" and value == "best"
    return key in ("max_steps", "num_train_epochs") or key.startswith("eval_") or key in evaluation or best


def lora_config(recipe: Recipe, section: str) -> Any:
    """The `peft.LoraConfig` of a section ("lora" or "recover.lora"); None if the recipe does not have the section.

    Default of target_modules: all linear maps except the head.

    Raises:
        ValueError: there are unknown keys or bad values, or PEFT is not installed.
    """
    given = recipe.lora if section == "lora" else recipe.recover.lora
    if given is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise HfDmsError(f"{section} needs PEFT: pip install 'hf_dms[peft]'.") from error
    values = {"target_modules": "all-linear", "task_type": recipe.task.peft} | coerce_fields(LoraConfig, given, section)
    try:
        return LoraConfig(**values)
    except (ValueError, TypeError) as error:
        raise HfDmsError(f"{section}: {error}") from error


def packing(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` of model.quantization.

    Args:
        recipe: the recipe.
        dtype: precision in which packed maps compute.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise HfDmsError("model.quantization needs bitsandbytes: pip install 'hf_dms[quantization]'.")
    if recipe.model.quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_to_float16)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_no_cast_to_float16(record: logging.LogRecord) -> bool:
    """bitsandbytes warns of this cast in each pass through each packed map: thousands of lines in a search."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def load_model_config(recipe: Recipe) -> Any:
    """The dense model's config.

    Raises:
        ValueError: there is none at model.path.
    """
    return _load_saved(recipe, AutoConfig)


def model_class(recipe: Recipe) -> Any:
    """transformers' Auto class of the recipe's task."""
    return getattr(transformers, recipe.task.model_class)


def load_processor(recipe: Recipe) -> Any:
    """The tokenizer or image processor of the dense model.

    Raises:
        ValueError: there is none at model.path.
    """
    return _load_saved(recipe, getattr(transformers, recipe.task.processor_class))


def _load_saved(recipe: Recipe, auto: Any) -> Any:
    try:
        return load_saved(auto, recipe.model.path, revision=recipe.model.revision)
    except HfDmsError as error:
        raise HfDmsError(f"model.path: {error}") from error


def empty_model(recipe: Recipe, config: Any) -> Any:
    """The dense model on the meta device."""
    with torch.device("meta"):
        return model_class(recipe).from_config(config)
