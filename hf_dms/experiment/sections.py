"""The sections of a recipe, their keys, defaults and ranges; but `data` is data.py's, and `dms` config.py's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import HfDmsError
from ..tasks.data import DataConfig
from ..tasks.registry import TASKS
from ..training.distillation import DistillationConfig


@dataclass
class SupernetConfig:
    """The `model.supernet` section: how much larger the network is that pipeline np searches in."""

    width: float = field(
        default=1.0,
        metadata={"help": "Factor of all widths that are pruned (heads, MLPs, residual streams), at least 1."},
    )
    depth: float = field(default=1.0, metadata={"help": "Factor of the numbers of layers, of every stage, at least 1."})

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
    task: str = field(default="text-generation", metadata={"help": f"What the model is for: {', '.join(TASKS)}."})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "8bit or 4bit (bitsandbytes): the search runs on packed weights, the cut takes the unpacked ones."
        },
    )

    supernet: SupernetConfig | None = None
    base: str | None = field(
        default=None, metadata={"help": "Hub id of the dense model for the card, where path is a folder."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Its license for the card, if its own card is missing."}
    )

    def __post_init__(self) -> None:
        if self.path is None:
            raise HfDmsError("model.path is required: the folder or Hub id of the dense model.")
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
            "help": "At most so many held-out examples are measured. Default: 64 for text-generation, otherwise all."
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Examples per forward pass."})
    texts: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Further files to measure on, {name: file}, read as data.path is. One that nothing was calibrated "
            "on shows what the cut costs outside the calibration's domain."
        },
    )
    prompt: str | list[str] = field(
        default="", metadata={"help": "Text, or a list of texts, that both models continue for the report."}
    )
    new_tokens: int = field(default=40, metadata={"help": "Tokens of each continuation of a prompt."})
    samples: int = field(
        default=4,
        metadata={
            "help": "Held-out examples of a classifier that the report shows with both models' predictions. 0 keeps "
            "the data out of the report."
        },
    )

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise HfDmsError(f"eval.samples must be at least 0, got {self.samples}.")
        for key in ("examples", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise HfDmsError(f"eval.{key} must be at least 1, got {value}.")


@dataclass
class CompareConfig:
    """The `compare` section: which cells `hf-dms compare` makes of a recipe."""

    strategies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Name in the table to settings: {criterion: NAME} for a one-shot one, {dms: {...}, train: {...}, "
            "recover: {...}} for other values of these sections; {} for a criterion's own name, or for dms as it is."
        },
    )
    targets: list[float] = field(default_factory=list, metadata={"help": "Budgets. Default: dms.target."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of the order of the examples and of everything else that is random."},
    )
    tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that every strategy may see, those of repair among them. Default: as many as the search "
            "of the recipe sees, and repair beside it."
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
            "help": "Larger sizes that the same search passes, multiples of 0.05 above dms.target. Each is cut, "
            "recovered, measured and saved too, as PATH-SIZE. For frozen weights (pipeline p-)."
        },
    )

    def __post_init__(self) -> None:
        if not all(isinstance(size, int | float) and not isinstance(size, bool) for size in self.sizes):
            raise HfDmsError(f"output.sizes must be numbers such as [0.9, 0.8], got {self.sizes!r}.")
        if self.path is None:
            raise HfDmsError("output.path is required: the folder to write the pruned model to.")


@dataclass
class HubConfig:
    """The `hub` section of a recipe: where the result is pushed to when it is saved."""

    repo_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, namespace/name. Default: no push."}
    )
    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private. Default: the setting of the account."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to. Default: main."})

    def __post_init__(self) -> None:
        if self.repo_id is None and (self.private is not None or self.revision is not None):
            raise HfDmsError("hub.repo_id is required in a hub section: where to push to, namespace/name.")


@dataclass
class RepairConfig:
    """The `recover.repair` section: least squares on the maps that write into the residual stream, see repair.py."""

    examples: int = field(
        default=64, metadata={"help": "Number of examples of the training data to repair on, evenly spaced."}
    )
    ridge: float | None = field(
        default=None,
        metadata={
            "help": "How strongly a weight is held at its old value, relative to the mean square of its inputs. "
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
            "help": "Keep only as much of the repair's change of the weights as lowers the loss on some of these "
            "examples: all, three quarters, half, a quarter, or nothing."
        },
    )

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise HfDmsError(f"recover.repair.epochs must be 0 or more, got {self.epochs}.")
        if self.examples < 1:
            raise HfDmsError(f"recover.repair.examples must be at least 1, got {self.examples}.")
        if self.ridge is not None and not self.ridge > 0:
            raise HfDmsError(f"recover.repair.ridge must be above 0, got {self.ridge}.")


@dataclass
class RecoverConfig:
    """The `recover` section: what is done to the pruned model after the cut, first repair, then retraining.

    An empty section, or one without a length, is completed by recovery.py. Without a section nothing is done.
    """

    repair: RepairConfig | None = None
    distillation: DistillationConfig | None = None
    data: DataConfig | None = field(
        default=None,
        metadata={"help": "Data to train on after the cut, such as instructions. Default: the data of the search."},
    )
    lora: dict[str, Any] | None = field(
        default=None, metadata={"help": "peft.LoraConfig for the training after the cut. Default: all weights train."}
    )
    float32: bool = field(
        default=False,
        metadata={
            "help": "Retrain a model of bfloat16 or float16 in float32 weights, which are rounded at the end: small "
            "steps of its own weights would be rounded away."
        },
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "What the training after the cut begins with: searched, the weights of the search, or fresh, new "
            "random ones of the shape that was found. Default: fresh with pipeline np, otherwise searched."
        },
    )
    train: dict[str, Any] | None = field(
        default=None, metadata={"help": "All other keys: TrainingArguments of a retraining. None: there is none."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.float32, bool):
            raise HfDmsError(f"recover.float32 must be true or false, got {self.float32!r}.")
        if self.weights not in (None, "fresh", "searched"):
            raise HfDmsError(f"recover.weights must be fresh or searched, got {self.weights!r}.")
