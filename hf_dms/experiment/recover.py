"""Defaults of a `recover` section without a length: every value of the training follows from the recipe.

The dense model teaches with its logits only, at temperature 1. In Minitron (arXiv 2407.14679) that was better than
labels, and than labels and logits together. The other values are rules of thumb. A value in the section replaces its
rule.

- Repair runs first, if weights were frozen and the architecture can be repaired.
- Length: the more was cut, the longer. Language models train for 2,000 steps times the share that was cut, at least 100
  steps and at most three epochs. Classifiers train for one epoch, plus 2.5 epochs times that share. If weights trained
  in the search, language models train half as long. If they were frozen, classifiers train twice as long.
- A step has at least 4,096 tokens, or 16 examples; gradients are accumulated for it.
- Learning rate: 3e-4 at 0.1 billion parameters, falling with the square root of their number, about a fifth of the
  rates of pretraining; 5e-5 for a classifier; 2e-4 for adapters. If weights trained in the search, that rate is kept.
- Fresh weights (pipeline np) have no teacher. They train for ten times as long as the search, in batches of the same
  size: the paper's search takes a tenth of the training that follows, or less.
- Adapters train in place of the weights for models of at least 3 billion parameters, and after a search on packed
  weights.
- Weights in half precision train in float32, because rounding to half precision would lose small steps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..config import SEARCH
from ..errors import HfDmsError
from ..refit.repairable import check_repairable
from ..tasks.task import Examples
from ..training.distillation import DistillationConfig
from .recipe import LENGTHS, Recipe
from .sections import RepairConfig

STEPS, FEWEST_STEPS, MOST_EPOCHS = 2000, 100, 3  # language models
EPOCHS, EPOCHS_OF_WHAT_IS_CUT = 1.0, 2.5  # classifiers
TOKENS_PER_STEP, EXAMPLES_PER_STEP = 4096, 16
RATE, AT_PARAMETERS, LOWEST_RATE, HIGHEST_RATE = 3e-4, 1e8, 2e-5, 5e-4
RATE_OF_CLASSIFIERS, RATE_OF_ADAPTERS = 5e-5, 2e-4
ADAPTERS_FROM = 3e9  # parameters
ADAPTERS = {"r": 16, "lora_alpha": 32}
WARMUP = 0.05  # share of the steps
AFRESH = 10  # length of training fresh weights, in lengths of the search


def with_recover_defaults(recipe: Recipe, model: Any, recover_examples: Examples, processes: int) -> Recipe:
    """A recipe with all values of its `recover` section, if that asks for a training without a length.

    Args:
        recipe: the recipe.
        model: the dense model on the meta device.
        recover_examples: the data of the training after the cut.
        processes: number of processes that train together.
    """
    given = recipe.recover
    if given.train is None or any(key in given.train for key in LENGTHS):
        return recipe
    # A strategy without a search leaves the weights as frozen as p- does.
    frozen = recipe.dms.strategy != SEARCH or recipe.dms.pipeline == "p-"
    parameters = model.num_parameters()
    lora = given.lora
    if (
        lora is None
        and not recipe.recovers_afresh
        and recipe.dms.layout != "padded"
        and (parameters >= ADAPTERS_FROM or recipe.model.quantization)
    ):
        lora = ADAPTERS
    teacher = given.distillation
    if teacher is None and not recipe.recovers_afresh and recipe.dms.pipeline != "np":
        teacher = DistillationConfig(weight=1.0, temperature=1.0)
    repair = given.repair
    if repair is None and frozen and not recipe.recovers_afresh and _is_repairable(model):
        # Where weights trained in the search, they are already fitted to the units that stay.
        repair = RepairConfig()
    half = _dtype(recipe, model) in (torch.bfloat16, torch.float16)
    batches = _ten_searches(recipe) if recipe.recovers_afresh else _batches(recipe, recover_examples, frozen, processes)
    defaults = batches | {
        "learning_rate": _rate(recipe, parameters, frozen, lora is not None),
        "warmup_steps": WARMUP,
        "lr_scheduler_type": "cosine",
    }
    if half and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        defaults["bf16"] = True
    recover = dataclasses.replace(
        given,
        repair=repair,
        distillation=teacher,
        lora=lora,
        float32=given.float32 or (half and lora is None),
        train=defaults | given.train,
    )
    return dataclasses.replace(recipe, recover=recover)


def _rate(recipe: Recipe, parameters: int, frozen: bool, adapters: bool) -> float:
    trained = [] if frozen else [recipe.train.get("learning_rate")]
    for rate in (*trained, recipe.finetune.get("learning_rate")):
        if rate is not None:
            return float(rate)
    if adapters:
        return RATE_OF_ADAPTERS
    if not recipe.task.generates:
        return RATE_OF_CLASSIFIERS
    # Larger models take smaller rates; the rule is one over the square root of the size, rounded to one digit.
    rate = RATE * math.sqrt(AT_PARAMETERS / max(parameters, 1))
    return float(f"{min(max(rate, LOWEST_RATE), HIGHEST_RATE):.1g}")


def _batches(recipe: Recipe, examples: Examples, frozen: bool, processes: int) -> dict[str, Any]:
    """Keys for gradient accumulation and length."""
    train = recipe.train | (recipe.recover.train or {})
    generates = recipe.task.generates
    wanted = math.ceil(TOKENS_PER_STEP / recipe.data.sequence_length) if generates else EXAMPLES_PER_STEP
    size = int(train.get("per_device_train_batch_size", 8)) * processes
    accumulated = max(math.ceil(wanted / size), int(train.get("gradient_accumulation_steps", 1)))
    found: dict[str, Any] = {"gradient_accumulation_steps": accumulated}
    cut = 1 - recipe.dms.target
    if not generates:
        epochs = (EPOCHS + EPOCHS_OF_WHAT_IS_CUT * cut) * (2 if frozen else 1)
        return found | {"num_train_epochs": round(epochs, 1)}
    steps = max(STEPS * cut * (1.0 if frozen else 0.5), FEWEST_STEPS)
    rows = len(examples.train) + (recipe.data.own_sequences if recipe.data.uses_own_texts else 0)
    # With few texts, 2,000 steps would be dozens of epochs, and the model would learn them by heart.
    through_the_data = MOST_EPOCHS * math.ceil(rows / (size * accumulated))
    return found | {"max_steps": min(round(steps), through_the_data)}


def _ten_searches(recipe: Recipe) -> dict[str, Any]:
    """Keys for ten times the length of the search, in batches of the same size."""
    steps = int(recipe.train.get("max_steps", -1))
    return (
        {"max_steps": AFRESH * steps}
        if steps > 0
        else {"num_train_epochs": AFRESH * float(recipe.train["num_train_epochs"])}
    )


def _is_repairable(model: Any) -> bool:
    try:
        check_repairable(model, bind(spec_for(model.config), model))
    except HfDmsError:
        return False
    return True


def _dtype(recipe: Recipe, model: Any) -> torch.dtype | None:
    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    return model.config.dtype


def recover_in_words(recipe: Recipe) -> list[str]:
    """The values of a recipe's `recover` section, a line each, as one would write them in the recipe."""
    recover = recipe.recover
    values: dict[str, Any] = {}
    for name, section in (("repair", recover.repair), ("distillation", recover.distillation)):
        if section is not None:
            values[f"recover.{name}"] = {key: value for key, value in vars(section).items() if value is not None}
    if recover.lora is not None:
        values["recover.lora"] = recover.lora
    if recover.float32:
        values["recover.float32"] = True
    values |= {f"recover.{key}": value for key, value in (recover.train or {}).items()}
    return [f"{key}: {_plain(value)}" for key, value in values.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}"
