"""A recipe: one YAML file, one experiment. This file reads it, and checks keys, types and ranges.

Sections: model, data, finetune, dms (`DMSConfig`), train, lora, recover, eval, output, hub, compare. The sections
finetune, train and recover take keys of `TrainingArguments`; lora and recover.lora take keys of `peft.LoraConfig`.
prepare.py checks a recipe against the model and the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import SEARCH, DMSConfig
from ..errors import HfDmsError
from ..tasks.data import OWN, DataConfig, is_data_file
from ..tasks.registry import TASKS
from ..tasks.task import Task
from ..training.distillation import DistillationConfig
from .packaged import packaged_recipes, recipe_names
from .sections import (
    CompareConfig,
    EvalConfig,
    HubConfig,
    ModelConfig,
    OutputConfig,
    RecoverConfig,
    RepairConfig,
    SupernetConfig,
)
from .values import check_keys, coerce_fields


@dataclass
class Recipe:
    """One experiment."""

    model: ModelConfig
    data: DataConfig
    dms: DMSConfig
    output: OutputConfig
    finetune: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    @property
    def task(self) -> Task:
        return TASKS[self.model.task]

    @property
    def recovers_afresh(self) -> bool:
        """Whether the training after the cut begins with new random weights."""
        default = "fresh" if self.dms.pipeline == "np" else "searched"
        return self.recover.train is not None and (self.recover.weights or default) == "fresh"

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe as plain values."""
        return dataclasses.asdict(self) | {"dms": self.dms.to_dict()}


CONFIG = "config.json"  # its presence marks the folder of a model
LENGTHS = ("max_steps", "num_train_epochs")  # keys for the length of a training
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "dms": DMSConfig,
    "output": OutputConfig,
    "eval": EvalConfig,
    "hub": HubConfig,
    "compare": CompareConfig,
}


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with hf_dms.
        overrides: `section.key=value` strings, with values in YAML. Paths in overrides are relative to the working
            folder. Paths in the recipe are relative to the recipe's folder, if the file exists there.

    Raises:
        ValueError: the recipe has a mistake; the message says where, and what to write instead.
    """
    file = Path(path)
    if not file.is_file() and (packaged_recipes() / path).is_file():
        file = packaged_recipes() / path
    if not file.is_file():
        raise HfDmsError(f"There is no recipe '{path}'. Recipes that come with hf_dms: {', '.join(recipe_names())}.")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise HfDmsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise HfDmsError(f"{path} must hold sections (model, data, dms, ...), got {type(values).__name__}.")
    _use_files_beside_the_recipe_(values, file.parent)
    for override in overrides or []:
        _override_(values, override)
    return build_recipe(values)


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once in a section. PyYAML would take the last one, and ignore the others."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # before merges (<<), whose keys may be replaced
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return node


def cut_options(overrides: list[str]) -> tuple[ModelConfig, OutputConfig]:
    """The sections model and output for a cut by a finished plan, from the command line without a recipe.

    Args:
        overrides: `section.key=value` strings: model.path, model.revision, output.path, output.overwrite.

    Raises:
        ValueError: there are other keys or values of the wrong type, or model.path or output.path is missing.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _override_(values, override)
    check_keys(values, ["model", "output"], "")
    model, output = _section(values, "model"), _section(values, "output")
    check_keys(values["model"], ["path", "revision"], "model.")
    return model, output


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Turn the nested values of a recipe into a `Recipe`.

    Raises:
        ValueError: unknown keys, values of the wrong type or out of range.
    """
    check_keys(values, [field.name for field in dataclasses.fields(Recipe)], "")
    sections: dict[str, Any] = {name: _section(values, name) for name in SECTIONS}
    for name in ("finetune", "train", "recover"):
        given = values.get(name)
        if not isinstance(given, dict | None):
            raise HfDmsError(f"{name} must be a section with keys of TrainingArguments, got {given!r}.")
        sections[name] = build_recover(given) if name == "recover" else given or {}
    recipe = Recipe(**sections, lora=_subsection(values, "lora", ""))
    _check_trained_weights(recipe)
    if recipe.dms.pipeline == "np" and (recipe.recover.repair or recipe.recover.distillation):
        raise HfDmsError(
            "recover.repair and recover.distillation need a trained dense model, and with pipeline np there is none. "
            "Leave them out, or use pipeline p."
        )
    _check_random_weights(recipe)
    _check_mix(recipe)
    if recipe.dms.sequence_length is None:
        recipe.dms = dataclasses.replace(recipe.dms, sequence_length=recipe.data.sequence_length)
    return recipe


def _check_random_weights(recipe: Recipe) -> None:
    """Check that a supernet, and fresh weights after the search, are compatible with the other options."""
    if recipe.model.supernet is not None and recipe.dms.pipeline != "np":
        raise HfDmsError(
            f"model.supernet has random weights, and dms.pipeline is {recipe.dms.pipeline}, which begins with "
            "pretrained ones. Write dms.pipeline: np, or leave model.supernet out."
        )
    if not recipe.recovers_afresh:
        return
    otherwise = "Write recover.weights: searched"
    if recipe.dms.layout == "padded":
        raise HfDmsError(
            f"recover.weights is fresh, and with dms.layout padded the zeros would become weights. {otherwise}, or use "
            "layout uniform or per_layer."
        )
    if recipe.recover.lora is not None or recipe.recover.repair is not None:
        given = "recover.lora" if recipe.recover.lora is not None else "recover.repair"
        raise HfDmsError(
            f"{given} needs weights to build on, and recover.weights is fresh. {otherwise}, or leave it out."
        )


def _check_mix(recipe: Recipe) -> None:
    """Check that data is mixed only for language models, and with own texts only if the dense model is trained."""
    if (recipe.data.mix or recipe.data.uses_own_texts) and not recipe.task.generates:
        raise HfDmsError(f"data.mix and the path {OWN} are for text-generation, and model.task is {recipe.model.task}.")
    if recipe.data.uses_own_texts and recipe.dms.pipeline == "np":
        raise HfDmsError(f"data: {OWN} is what the dense model writes, and with pipeline np it is random. Use p or p-.")
    if recipe.recover.data is not None and recipe.recover.data.uses_own_texts:
        raise HfDmsError(f"recover.data: {OWN} is not possible there. Mix it into data, and leave recover.data out.")


def _section(values: dict[str, Any], name: str) -> Any:
    # YAML reads a section without keys as null.
    given = values.get(name) or {}
    if not isinstance(given, dict):
        raise HfDmsError(f"{name} must be a section with keys, got {given!r}.")
    found = coerce_fields(SECTIONS[name], given, name)
    if name == "model" and (larger := _subsection(given, "supernet", "model.")) is not None:
        found["supernet"] = SupernetConfig(**coerce_fields(SupernetConfig, larger, "model.supernet"))
    return SECTIONS[name](**found)


def build_recover(given: dict[str, Any] | None) -> RecoverConfig:
    """A `recover` section of its values.

    Raises:
        ValueError: unknown keys, or values of the wrong type or out of range.
    """
    if given is None:
        return RecoverConfig()
    sections: dict[str, Any] = {}
    for name, section in (("repair", RepairConfig), ("distillation", DistillationConfig), ("data", DataConfig)):
        values = _subsection(given, name, "recover.")
        if values is not None:
            values = coerce_fields(section, values, f"recover.{name}")
            with saying_where("recover.") if section is DataConfig else contextlib.nullcontext():
                sections[name] = section(**values)
    lora = _subsection(given, "lora", "recover.")
    own = [option.name for option in dataclasses.fields(RecoverConfig)]
    train = {key: value for key, value in given.items() if key not in own}
    # A section with repair and nothing else asks for no training; an empty one asks for that of recover.py.
    repairs_alone = [key for key, value in given.items() if value is not None] == ["repair"]
    options = {key: given[key] for key in ("float32", "weights") if given.get(key) is not None}
    return RecoverConfig(**sections, **options, lora=lora, train=None if repairs_alone else train)


@contextlib.contextmanager
def saying_where(prefix: str) -> Iterator[None]:
    """Context: errors that begin with `data.` get a prefix with the section that the data belongs to."""
    try:
        yield
    except HfDmsError as error:
        where = prefix if str(error).startswith("data.") else ""
        raise HfDmsError(f"{where}{error}") from error


def _subsection(given: dict[str, Any], name: str, prefix: str) -> dict[str, Any] | None:
    values = given.get(name)
    if values is not None and not isinstance(values, dict):
        raise HfDmsError(f"{prefix}{name} must be a section with keys, or {{}} for its defaults; got {values!r}.")
    return values


def _check_trained_weights(recipe: Recipe) -> None:
    """Check that lora, quantization, finetune and pipeline are compatible."""
    pipeline, quantization = recipe.dms.pipeline, recipe.model.quantization
    if recipe.lora is not None and pipeline != "p":
        raise HfDmsError(
            f"lora trains beside pretrained weights that are frozen, and dms.pipeline is {pipeline}: use pipeline p."
        )
    if recipe.dms.strategy != SEARCH and (recipe.lora is not None or quantization is not None):
        given = "lora" if recipe.lora is not None else "model.quantization"
        raise HfDmsError(
            f"{given} is for a search, and dms.strategy is {recipe.dms.strategy}, which chooses without one. Leave one "
            "of the two out."
        )
    if quantization is not None and (pipeline == "np" or (pipeline == "p" and recipe.lora is None)):
        raise HfDmsError(
            f"model.quantization: weights in {quantization} cannot train, which dms.pipeline {pipeline} asks for. "
            "Use pipeline p-, or add a lora section."
        )
    if quantization is not None and recipe.finetune:
        raise HfDmsError("model.quantization packs the weights of model.path, not fine-tuned ones: leave one out.")
    if recipe.recover.lora is not None and recipe.dms.layout == "padded":
        raise HfDmsError(
            "recover.lora with dms.layout padded: adapters would fill the zeros. Use layout per_layer, or train all "
            "weights, which leaves the zeros as they are."
        )


def _override_(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise HfDmsError(f"An override is section.key=value, got '{override}'.")
    *sections, key = path.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise HfDmsError(f"Override '{override}': {section} is not a section.")
        values = inner
    try:
        values[key] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise HfDmsError(f"Override {override!r}: the value is not valid YAML: {reason}") from None


def _use_files_beside_the_recipe_(values: dict[str, Any], folder: Path) -> None:
    """Make relative paths of data files and the model's folder relative to the recipe's folder, if they exist there."""
    recover, model = values.get("recover"), values.get("model")
    if isinstance(model, dict) and isinstance(path := model.get("path"), str) and (folder / path / CONFIG).is_file():
        model["path"] = str(folder / path)
    for data in (values.get("data"), recover.get("data") if isinstance(recover, dict) else None):
        if not isinstance(data, dict):
            continue
        data |= {key: _beside(data[key], folder) for key in ("path", "held_out") if key in data}
        if isinstance(data.get("mix"), dict):
            data["mix"] = {_beside(path, folder): weight for path, weight in data["mix"].items()}
    for measured in (values.get("eval"), values.get("compare")):
        if isinstance(measured, dict) and isinstance(measured.get("texts"), dict):
            measured["texts"] = {name: _beside(path, folder) for name, path in measured["texts"].items()}


def _beside(path: Any, folder: Path) -> Any:
    """The path of a data file in the recipe's folder, if it exists there; else the path unchanged."""
    is_there = isinstance(path, str) and is_data_file(path) and (folder / path).is_file()
    return str(folder / path) if is_there else path
