"""A recipe: one YAML, one experiment. Reading it, checking it, and saying what is wrong with it.

Sections: model, data, finetune, dms (`DMSConfig`), train, recover, eval, output; finetune, train and recover take
`TrainingArguments` by their own names.
`check_recipe` finds what can be found before any weight is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config import DMSConfig
from .data import BUILDERS, DataConfig
from .tasks import TASKS, Task


@dataclass
class ModelConfig:
    """The `model` section of a recipe."""

    path: str = field(default=None, metadata={"help": "Folder or Hub id of the dense model. Required."})
    task: str = field(default="text-generation", metadata={"help": f"What it is for: {', '.join(TASKS)}."})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("model.path is required: the folder or Hub id of the dense model.")
        if self.task not in TASKS:
            raise ValueError(f"model.task must be one of {', '.join(TASKS)}; got {self.task!r}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"model.dtype must be auto, float32, bfloat16 or float16; got {self.dtype!r}.")


@dataclass
class EvalConfig:
    """The `eval` section of a recipe."""

    examples: int | None = field(
        default=None,
        metadata={"help": "Held-out examples to measure on, at most. Default: 64 for text-generation, otherwise all."},
    )
    batch_size: int = field(default=4, metadata={"help": "Examples per forward pass."})
    prompt: str = field(default="", metadata={"help": "Text that the pruned model continues, for the report."})
    new_tokens: int = field(default=40, metadata={"help": "Tokens of that continuation."})


@dataclass
class OutputConfig:
    """The `output` section of a recipe."""

    path: str = field(default=None, metadata={"help": "Folder of the pruned model. Required."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing folder."})

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("output.path is required: the folder to write the pruned model to.")


@dataclass
class DistillationConfig:
    """The `recover.distillation` section: the dense model teaches the pruned one (Hinton et al., arXiv 1503.02531)."""

    weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher in the loss, the rest is the labels', in (0, 1]."}
    )
    temperature: float = field(default=2.0, metadata={"help": "What both models' logits are divided by."})

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"recover.distillation.weight must be in (0, 1], got {self.weight}.")
        if not self.temperature > 0:
            raise ValueError(f"recover.distillation.temperature must be above 0, got {self.temperature}.")


@dataclass
class RecoverConfig:
    """The `recover` section: what is done to the pruned model after the cut."""

    distillation: DistillationConfig | None = None
    train: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "All other keys: TrainingArguments of a retraining, if there are any."}
    )


@dataclass
class Recipe:
    """One experiment."""

    model: ModelConfig
    data: DataConfig
    dms: DMSConfig
    output: OutputConfig
    finetune: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def task(self) -> Task:
        return TASKS[self.model.task]

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe as plain values."""
        return dataclasses.asdict(self) | {"dms": self.dms.to_dict()}


SECTIONS = {"model": ModelConfig, "data": DataConfig, "dms": DMSConfig, "output": OutputConfig, "eval": EvalConfig}


def packaged_recipes() -> Path:
    """The folder of the recipes that come with hf_dms, installed or in the source tree."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with hf_dms.
        overrides: `section.key=value` strings, values in YAML.

    Raises:
        ValueError: anything that is wrong with it; the message says where and what to write instead.
    """
    file = Path(path)
    if not file.is_file() and (packaged_recipes() / path).is_file():
        file = packaged_recipes() / path
    if not file.is_file():
        names = ", ".join(sorted(recipe.name for recipe in packaged_recipes().glob("*.yaml")))
        raise ValueError(f"There is no recipe '{path}'. Recipes that come with hf_dms: {names}.")
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections (model, data, dms, ...), got {type(values).__name__}.")
    for override in overrides or []:
        _override_(values, override)
    _use_files_beside_the_recipe_(values, file.parent)
    return build_recipe(values)


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Turn the nested values of a recipe into a `Recipe`.

    Raises:
        ValueError: unknown keys, values of the wrong type or out of range.
    """
    _check_keys(values, [field.name for field in dataclasses.fields(Recipe)], "")
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{name} must be a section with keys, got {given!r}.")
        sections[name] = section(**coerce_fields(section, given, name))
    for name in ("finetune", "train", "recover"):
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{name} must be a section with keys of TrainingArguments, got {given!r}.")
        sections[name] = _build_recover(given) if name == "recover" else given
    recipe = Recipe(**sections)
    if recipe.dms.sequence_length is None:
        recipe.dms = dataclasses.replace(recipe.dms, sequence_length=recipe.data.sequence_length)
    return recipe


def _build_recover(given: dict[str, Any]) -> RecoverConfig:
    training = {key: value for key, value in given.items() if key != "distillation"}
    distillation = given.get("distillation")
    if distillation is None:
        return RecoverConfig(train=training)
    if not isinstance(distillation, dict):
        raise ValueError(f"recover.distillation must be a section with keys, got {distillation!r}.")
    if not training:
        raise ValueError("recover.distillation is part of a retraining: give recover.max_steps too.")
    values = coerce_fields(DistillationConfig, distillation, "recover.distillation")
    return RecoverConfig(DistillationConfig(**values), training)


def coerce_fields(cls: type, given: dict[str, Any], section: str) -> dict[str, Any]:
    """The values of a section, in the types that its dataclass declares.

    PyYAML reads `1e-4` as a string; a value that the field's type can hold is converted.

    Raises:
        ValueError: a key that the dataclass lacks, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    _check_keys(given, [field.name for field in dataclasses.fields(cls) if field.init], f"{section}.")
    return {key: _coerce(value, hints[key], f"{section}.{key}") for key, value in given.items()}


def _coerce(value: Any, hint: Any, name: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    kinds = [kind for kind in kinds if isinstance(kind, type)]
    if value is None or not kinds or (isinstance(value, bool) and bool in kinds):
        return value
    if any(isinstance(value, kind) for kind in kinds) and not isinstance(value, bool):
        return value
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if int in kinds and isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and any(issubclass(kind, str) for kind in kinds):
        return value
    if not any(kind in (int, float, bool, str, dict, list, tuple) for kind in kinds):
        return value  # an enum or a class that TrainingArguments checks itself
    expected = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
    raise ValueError(f"{name} must be {expected}, got {value!r}.")


def _check_keys(given: dict[str, Any], known: list[str], prefix: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known keys: {', '.join(sorted(known))}."
            raise ValueError(f"Unknown key {prefix}{key}.{hint}")


def _override_(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"An override is section.key=value, got '{override}'.")
    *sections, key = path.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"Override '{override}': {section} is not a section.")
        values = inner
    values[key] = yaml.safe_load(text)


def _use_files_beside_the_recipe_(values: dict[str, Any], folder: Path) -> None:
    """Relative data files that stand beside the recipe are meant relative to it."""
    data = values.get("data")
    for key in ("path", "held_out"):
        value = data.get(key) if isinstance(data, dict) else None
        if isinstance(value, str) and Path(value).suffix in BUILDERS and (folder / value).is_file():
            data[key] = str(folder / value)


# ---- checks that need transformers, but no weights -------------------------------------------------------------------
def training_arguments(recipe: Recipe, section: str, output_dir: Path) -> Any:
    """The `TrainingArguments` of the search, or of the training before or after it.

    Args:
        section: train, finetune or recover (which take over the values of train, but for its length).
        output_dir: where checkpoints go.

    Raises:
        ValueError: unknown keys or bad values.
    """
    import torch
    from transformers import TrainingArguments

    given = recipe.train
    if section != "train":
        shared = {key: value for key, value in given.items() if key not in ("max_steps", "num_train_epochs")}
        given = shared | (recipe.finetune if section == "finetune" else recipe.recover.train)
    if "output_dir" in given:
        raise ValueError(f"{section}.output_dir: the output folder is output.path.")
    defaults = {"logging_steps": 10, "report_to": "none", "save_total_limit": 1}
    accelerated = torch.accelerator.is_available()
    defaults |= {"dataloader_pin_memory": accelerated, "use_cpu": not accelerated}  # without use_cpu bf16 needs a GPU
    defaults |= {"remove_unused_columns": recipe.model.task != "image-classification"}  # images are decoded on demand
    values = defaults | coerce_fields(TrainingArguments, given, section)
    if values.get("max_steps", -1) <= 0 and "num_train_epochs" not in values:
        raise ValueError(f"{section}.max_steps is required (or {section}.num_train_epochs): how long it runs.")
    try:
        return TrainingArguments(output_dir=str(output_dir), **values)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{section}: {error}") from error


def load_model_config(recipe: Recipe, labels: tuple[str, ...] = ()) -> Any:
    """The dense model's config.

    Args:
        recipe: where the model is.
        labels: names of the classes of its head, if it has one.

    Raises:
        ValueError: there is none at model.path.
    """
    from transformers import AutoConfig

    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        config = AutoConfig.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path: no model can be read from '{recipe.model.path}'. {reason}") from error
    if labels:
        config.update(named)
    return config


def model_class(recipe: Recipe) -> Any:
    """transformers' Auto class of the recipe's task."""
    import transformers

    return getattr(transformers, recipe.task.model_class)


def load_processor(recipe: Recipe) -> Any:
    """The tokenizer or image processor of the dense model.

    Raises:
        ValueError: there is none at model.path.
    """
    import transformers

    kind = recipe.task.processor_class
    try:
        return getattr(transformers, kind).from_pretrained(recipe.model.path, revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        what = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}[kind]
        raise ValueError(f"model.path: '{recipe.model.path}' has no {what} that can be read. {error}") from error


def check_recipe(recipe: Recipe) -> None:
    """Check a recipe against the model and the data, without loading weights.

    Raises:
        ValueError: the first thing that is wrong.
    """
    import torch

    from .archs import spec_for
    from .data import load_examples
    from .request import build_gates
    from .rounding import check_target
    from .spec import bind
    from .trainer import check_training_arguments

    unfinished = Path(recipe.output.path + ".unfinished")
    check_training_arguments(training_arguments(recipe, "train", unfinished))
    for section, values in (("finetune", recipe.finetune), ("recover", recipe.recover.train)):
        if values:
            training_arguments(recipe, section, unfinished)
    config = load_model_config(recipe)
    spec = spec_for(config)
    auto = model_class(recipe)
    if type(config) not in auto._model_mapping or (recipe.model.task == "text-generation" and spec.cache is None):
        raise ValueError(
            f"model.task: there is no {recipe.model.task} model of type '{config.model_type}'. "
            f"Tasks are {', '.join(TASKS)}."
        )
    examples = load_examples(recipe.data, recipe.task, load_processor(recipe), config.label2id)
    config = load_model_config(recipe, examples.labels)
    with torch.device("meta"):
        model = auto.from_config(config)
    bound = bind(spec, model)
    gates = build_gates(bound, model, recipe.dms, device=torch.device("cpu"))
    check_target(gates, bound, recipe.dms, config)
