"""What can be known to be wrong with a recipe before any weight is loaded, and what a recipe's sections mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available

from ..archs.bind import bind
from ..archs.plain_view import with_adapters
from ..archs.registry import spec_for
from ..checkpoint.hub import check_repo_id, check_token
from ..errors import HfDmsError
from ..gating.gates_for import build_gates
from ..gating.rounding import check_target
from ..tasks.registry import TASKS, load_examples, load_more_examples
from ..training.trainer import check_training_arguments
from .recipe import Recipe, coerce_fields, saying_where


def training_arguments(recipe: Recipe, section: str, output_dir: Path) -> Any:
    """The `TrainingArguments` of the search, or of the training before or after it.

    Args:
        section: train, finetune or recover (which take over the values of train, but for its length and evaluations).
        output_dir: where checkpoints go.

    Raises:
        ValueError: unknown keys or bad values.
    """
    given = recipe.train
    if section != "train":
        own = recipe.finetune if section == "finetune" else recipe.recover.train
        given = {key: value for key, value in given.items() if not _is_of_a_search(key, value)} | own
        if own.get("eval_strategy") not in (None, False, "no") or own.get("load_best_model_at_end"):
            raise HfDmsError(
                f"{section}.eval_strategy, {section}.load_best_model_at_end: there is no evaluation during this "
                "training, the model is measured after it. Leave them out; the search evaluates by train.eval_strategy."
            )
    if "output_dir" in given:
        raise HfDmsError(f"{section}.output_dir: the output folder is output.path.")
    for key in ("push_to_hub", "hub_token"):
        if key in given:  # a recipe is written into what is pushed, and a training checkpoint is not the result
            raise HfDmsError(f"{section}.{key}: give hub.repo_id, and the token by `hf auth login` or HF_TOKEN.")
    defaults: dict[str, Any] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 1}
    accelerated = torch.accelerator.is_available()
    defaults |= {"dataloader_pin_memory": accelerated, "use_cpu": not accelerated}  # without use_cpu bf16 needs a GPU
    values = defaults | coerce_fields(TrainingArguments, given, section)
    if values.get("max_steps", -1) <= 0 and "num_train_epochs" not in values:
        raise HfDmsError(f"{section}.max_steps is required (or {section}.num_train_epochs): how long it runs.")
    try:
        return TrainingArguments(output_dir=str(output_dir), **values)
    except (ValueError, TypeError, ImportError) as error:
        raise HfDmsError(f"{section}: {error}") from error


def _is_of_a_search(key: str, value: Any) -> bool:
    """Whether a key of `train` is not meant for the trainings before and after the search: its length, evaluations."""
    evaluation = ("do_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    best = key == "save_strategy" and value == "best"
    return key in ("max_steps", "num_train_epochs") or key.startswith("eval_") or key in evaluation or best


def lora_config(recipe: Recipe, section: str) -> Any:
    """The `peft.LoraConfig` of the search ("lora") or of the retraining ("recover.lora"), None without such a section.

    All linear maps but the head are adapted unless target_modules says otherwise.

    Raises:
        ValueError: unknown keys or bad values, or PEFT is missing.
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
        dtype: what packed maps compute in.

    Raises:
        ValueError: bitsandbytes is missing.
    """
    if not is_bitsandbytes_available():
        raise HfDmsError("model.quantization needs bitsandbytes: pip install 'hf_dms[quantization]'.")
    if recipe.model.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_model_config(recipe: Recipe, values: dict[str, Any] | None = None) -> Any:
    """The dense model's config.

    Args:
        recipe: where the model is.
        values: what it must say for the examples, `Examples.config`.

    Raises:
        ValueError: there is none at model.path.
    """
    try:
        config = AutoConfig.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HfDmsError(f"model.path: no model can be read from '{recipe.model.path}'. {reason}") from error
    config.update(values or {})
    return config


def model_class(recipe: Recipe) -> Any:
    """transformers' Auto class of the recipe's task."""
    return getattr(transformers, recipe.task.model_class)


def load_processor(recipe: Recipe) -> Any:
    """The tokenizer or image processor of the dense model.

    Raises:
        ValueError: there is none at model.path.
    """
    kind = recipe.task.processor_class
    try:
        return getattr(transformers, kind).from_pretrained(recipe.model.path, revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        what = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}[kind]
        raise HfDmsError(f"model.path: '{recipe.model.path}' has no {what} that can be read. {error}") from error


def check_recipe(recipe: Recipe) -> None:
    """Check a recipe against the model and the data, without loading weights.

    Raises:
        ValueError: the first thing that is wrong.
    """
    if recipe.hub.repo_id is not None:
        check_repo_id(recipe.hub.repo_id)
        check_token()
    unfinished = Path(recipe.output.path + ".unfinished")
    check_training_arguments(training_arguments(recipe, "train", unfinished))
    for section, values in (("finetune", recipe.finetune), ("recover", recipe.recover.train)):
        if values:
            training_arguments(recipe, section, unfinished)
    if recipe.model.quantization:
        packing(recipe, torch.float32)
    config = load_model_config(recipe)
    spec = spec_for(config)
    auto = model_class(recipe)
    if type(config) not in auto._model_mapping or (recipe.task.generates and spec.cache is None):
        raise HfDmsError(
            f"model.task: there is no {recipe.model.task} model of type '{config.model_type}'. "
            f"Tasks are {', '.join(TASKS)}."
        )
    processor, new_head = load_processor(recipe), recipe.dms.pipeline == "np"
    examples = load_examples(recipe.data, recipe.task, processor, config, new_head=new_head)
    if recipe.recover.data is not None:
        with saying_where("recover."):
            load_more_examples(recipe.recover.data, recipe.task, processor, config, examples)
    config = load_model_config(recipe, examples.config)
    with torch.device("meta"):
        model = auto.from_config(config)
    bound = bind(spec, model)
    gates = build_gates(bound, model, recipe.dms, device=torch.device("cpu"))
    check_target(gates, bound, recipe.dms, config)
    for section in ("lora", "recover.lora"):
        if (lora := lora_config(recipe, section)) is not None:
            with torch.device("meta"):
                model = auto.from_config(config)
                try:
                    with_adapters(model, lora, seed=0)
                except ValueError as error:  # ours or PEFT's
                    raise HfDmsError(f"{section}: {error}") from error
