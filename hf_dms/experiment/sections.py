"""The sections of a recipe: keys, defaults and ranges. `data` is in tasks/data.py, and `dms` in config.py."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HfDmsError
from ..tasks.data import DataConfig
from ..tasks.registry import TASKS
from ..training.distillation import DistillationConfig


def check_seed(seed: int, key: str) -> None:
    """Check a seed. numpy gets the seed too, and would refuse one that is out of range only during the run."""
    if not 0 <= seed < 2**32:
        raise HfDmsError(f"{key} must be in [0, {2**32 - 1}], got {seed}.")


def checked_texts(texts: dict[str, str], key: str) -> dict[str, str]:
    """Files by name, with `~` replaced by the home folder.

    Raises:
        HfDmsError: a value is not a path.
    """
    for name, path in texts.items():
        if not isinstance(path, str):
            raise HfDmsError(f"{key}.{name} must be the path of a file, got {path!r}.")
    return {name: os.path.expanduser(path) for name, path in texts.items()}


@dataclass
class SupernetConfig:
    """The `model.supernet` section: the size of the larger network in which pipeline np searches."""

    width: float = field(
        default=1.0,
        metadata={"help": "Factor for all widths that are pruned (heads, MLPs, residual streams), at least 1."},
    )
    depth: float = field(default=1.0, metadata={"help": "Factor for the number of layers in every stage, at least 1."})

    def __post_init__(self) -> None:
        for name, factor in vars(self).items():
            if isinstance(factor, bool) or not 1 <= factor < float("inf"):
                raise HfDmsError(f"model.supernet.{name} must be a factor of at least 1, got {factor!r}.")
        if self.width == self.depth == 1:
            raise HfDmsError(
                "model.supernet makes nothing larger: give width or depth, as {width: 2, depth: 1.5}, or leave it out."
            )


@dataclass
class ModelConfig:
    """The `model` section of a recipe."""

    path: str = field(  # type: ignore[assignment]  # None is refused below
        default=None, metadata={"help": "Folder or Hub id of the dense model. Required."}
    )
    task: str = field(default="text-generation", metadata={"help": f"Task of the model: {', '.join(TASKS)}."})
    dtype: str = field(
        default="auto", metadata={"help": "Precision: auto (the checkpoint's), float32, bfloat16 or float16."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "transformers' attention implementation: sdpa, eager, flash_attention_2, ..."}
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "8bit or 4bit (bitsandbytes): the search runs on packed weights, and the cut unpacks them."},
    )

    supernet: SupernetConfig | None = None
    base: str | None = field(
        default=None, metadata={"help": "Hub id of the dense model for the model card, if path is a folder."}
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the dense model for the model card, if its own card is missing."}
    )

    def __post_init__(self) -> None:
        if not self.path:
            raise HfDmsError("model.path is required: the folder or Hub id of the dense model.")
        self.path = os.path.expanduser(self.path)
        if self.task not in TASKS:
            raise HfDmsError(f"model.task must be one of {', '.join(TASKS)}; got {self.task!r}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise HfDmsError(f"model.dtype must be auto, float32, bfloat16 or float16; got {self.dtype!r}.")
        if self.quantization not in (None, "8bit", "4bit"):
            raise HfDmsError(f"model.quantization must be 8bit or 4bit, or be left out; got {self.quantization!r}.")


@dataclass
class EvalConfig:
    """The `eval` section of a recipe."""

    examples: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of held-out examples to measure on. Default: 64 for text-generation, otherwise all."
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Examples per forward pass."})
    texts: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Further files to measure on, {name: file}, in the format of data.path. A text of another domain "
            "shows what the cut costs outside the domain of the calibration text."
        },
    )
    prompt: str | list[str] = field(
        default="", metadata={"help": "A text, or a list of texts, that both models continue for the report."}
    )
    new_tokens: int = field(default=40, metadata={"help": "Tokens of each continuation of a prompt."})
    samples: int = field(
        default=4,
        metadata={
            "help": "Number of held-out examples of a classifier or detector that the report shows with both models' "
            "predictions. 0 keeps the data out of the report."
        },
    )

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise HfDmsError(f"eval.samples must be at least 0, got {self.samples}.")
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise HfDmsError(f"eval.prompt must be a text or a list of texts, got {self.prompt!r}. Write it in quotes.")
        self.texts = checked_texts(self.texts, "eval.texts")
        for key in ("examples", "batch_size", "new_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise HfDmsError(f"eval.{key} must be at least 1, got {value}.")


@dataclass
class CompareConfig:
    """The `compare` section: the strategies, budgets and seeds that `hf-dms compare` runs."""

    strategies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings by name in the table. {criterion: NAME}: a one-shot strategy. {dms: {...}, train: {...}, "
            "recover: {...}}: a search with other values in these sections. {}: the criterion of that name, or for dms "
            "the search of the recipe."
        },
    )
    targets: list[float] = field(default_factory=list, metadata={"help": "Budgets. Default: dms.target."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds for the order of the examples and everything else that is random."},
    )
    tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that every strategy may see, including those of repair. Default: as many as the "
            "search of the recipe sees, plus those of repair."
        },
    )
    texts: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Further files to measure on, by name, such as text of another domain."}
    )

    def __post_init__(self) -> None:
        for target in self.targets:
            if not 0 < target <= 1:
                raise HfDmsError(f"compare.targets must be in (0, 1], got {target}. For 60 % write 0.6.")
        if not self.seeds:
            raise HfDmsError("compare.seeds is empty: give at least one, or leave it out.")
        for seed in self.seeds:
            check_seed(seed, "compare.seeds")
        self.texts = checked_texts(self.texts, "compare.texts")


@dataclass
class OutputConfig:
    """The `output` section of a recipe."""

    path: str = field(  # type: ignore[assignment]  # None is refused below
        default=None, metadata={"help": "Folder of the pruned model. Required."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing folder."})
    sizes: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Larger sizes that the same search passes, multiples of 0.05 above dms.target. Each is also cut, "
            "recovered, measured and saved, as PATH-SIZE. Only for frozen weights (pipeline p-)."
        },
    )

    def __post_init__(self) -> None:
        if not self.path:
            raise HfDmsError("output.path is required: the folder to write the pruned model to.")
        # The shell leaves `~` as it is in output.path=~/smaller.
        self.path = os.path.expanduser(self.path)
        # Other folders are made beside it, with names that begin with its own.
        if Path(self.path).name in ("", ".."):
            raise HfDmsError(
                f"output.path must name a folder of its own, got '{self.path}'. Write it as outputs/smaller."
            )


@dataclass
class HubConfig:
    """The `hub` section of a recipe: the repository to which the saved result is pushed."""

    repo_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, namespace/name. Default: no push."}
    )
    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private. Default: the setting of the account."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to. Default: main."})

    def __post_init__(self) -> None:
        if self.repo_id is None and (self.private is not None or self.revision is not None):
            raise HfDmsError("hub.repo_id is required in a hub section: the repository to push to, namespace/name.")


REPAIR_BATCH = 4  # examples per batch of a repair


@dataclass
class RepairConfig:
    """The `recover.repair` section: least-squares reconstruction of the residual stream (refit/repair.py)."""

    examples: int = field(
        default=64, metadata={"help": "Number of examples of the training data to repair on, evenly spaced."}
    )
    ridge: float | None = field(
        default=None,
        metadata={
            "help": "How strongly changes of a weight are held back, relative to the mean square of its inputs. "
            "Default: chosen for each map on held-out examples."
        },
    )
    epochs: int = field(
        default=0,
        metadata={
            "help": "Passes over these examples in which all maps of an attention or an MLP learn together, after "
            "least squares, to bring the residual stream closest to the dense model's. With four of them a "
            "repair took 3.5 times as long."
        },
    )
    interpolate: bool = field(
        default=True,
        metadata={
            "help": "Keep the share of the repair's change that gives the lowest loss on some of these examples: all, "
            "three quarters, half, a quarter, or nothing."
        },
    )

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise HfDmsError(f"recover.repair.epochs must be 0 or more, got {self.epochs}.")
        if self.examples < 1:
            raise HfDmsError(f"recover.repair.examples must be at least 1, got {self.examples}.")
        if self.epochs and self.examples <= REPAIR_BATCH:
            raise HfDmsError(
                f"recover.repair.epochs holds out a batch of {REPAIR_BATCH} examples and learns on the others, so "
                f"recover.repair.examples must be more than {REPAIR_BATCH}, got {self.examples}."
            )
        if self.ridge is not None and not self.ridge > 0:
            raise HfDmsError(f"recover.repair.ridge must be above 0, got {self.ridge}.")


@dataclass
class RecoverConfig:
    """The `recover` section: the work on the pruned model after the cut, first repair, then training.

    recover.py fills in the values of an empty section, or of one without a length. Without a section nothing is done.
    """

    repair: RepairConfig | None = None
    distillation: DistillationConfig | None = None
    data: DataConfig | None = field(
        default=None,
        metadata={"help": "Data of the training after the cut, such as instructions. Default: the data of the search."},
    )
    lora: dict[str, Any] | None = field(
        default=None, metadata={"help": "peft.LoraConfig for the training after the cut. Default: all weights train."}
    )
    float32: bool = field(
        default=False,
        metadata={
            "help": "Train a model in bfloat16 or float16 with float32 weights, and round them at the end. In half "
            "precision, rounding would lose small steps."
        },
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights at the start of the training after the cut. searched: those of the search. fresh: new "
            "random weights in the shape that was found. Default: fresh with pipeline np, otherwise searched."
        },
    )
    train: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "All other keys: TrainingArguments of the training after the cut. None: no training."},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.float32, bool):
            raise HfDmsError(f"recover.float32 must be true or false, got {self.float32!r}.")
        if self.weights not in (None, "fresh", "searched"):
            raise HfDmsError(f"recover.weights must be fresh or searched, got {self.weights!r}.")
