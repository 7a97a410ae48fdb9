"""Every option of a search, in one dataclass: it is the Python API, the `dms` section of a recipe and the command line.

The `help` text of each field is its documentation. This file imports nothing heavy, so that a recipe can be checked
without waiting for torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from .errors import HfDmsError

RESOURCES = ("params", "macs", "kv_bytes")
RESOURCE_SCOPES = ("model", "layers")
LAYOUTS = ("uniform", "per_layer", "padded")
PIPELINES = ("p", "np", "p-")
TARGET_SCHEDULES = ("geometric", "constant")
SEARCHES_OVER = ("masks", "refitted")
SEARCH = "dms"  # the strategy that is a search


AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([KMGBT])", re.IGNORECASE)
MULTIPLES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def amount(text: str) -> float:
    """The number that an amount such as 100M or 1.5B stands for."""
    found = AMOUNT.fullmatch(text)
    assert found is not None
    return float(found[1]) * MULTIPLES[found[2].upper()]


def _number_or_amount(text: str) -> float | str:
    """A number or an amount from text: YAML reads 1e-1 (without a point) as text. An amount is returned unchanged.

    Raises:
        ValueError: the text is neither.
    """
    if AMOUNT.fullmatch(text) and amount(text) > 0:
        return text
    try:
        return float(text)
    except ValueError:
        raise HfDmsError(
            f"dms.target must be a number in (0, 1], or an amount such as 100M, got {text!r}. For 60 % write "
            "target: 0.6"
        ) from None


def _option(default: Any, help: str) -> Any:
    """A dataclass field that carries its documentation."""
    return field(default=default, metadata={"help": help})


def _mapping(help: str) -> Any:
    """A dataclass field for a mapping, empty by default, that carries its documentation."""
    return field(default_factory=dict, metadata={"help": help})


@dataclass
class DMSConfig:
    """What to prune, how far, and how the search runs (Differentiable Model Scaling, arXiv 2405.07194).

    Raises:
        ValueError: when a value is outside its range; the message names the value, what was expected and the fix.
    """

    target: Any = _option(  # a float, or text such as 100M until the dense model is known, see with_share
        None,
        "Fraction of the dense resource to keep, in (0, 1]: 0.6 keeps 60 %. Or an amount with K, M, G (or B) or T: "
        "100M keeps 100 million parameters (or MACs, or bytes, as resource says). With model.supernet, a fraction "
        "counts against the original model. Required, unless sizes gives the shape.",
    )
    resource: str = _option(
        "params",
        "What is limited: params (parameters; tied parameters count once), macs (multiply-accumulates per token) or "
        "kv_bytes (bytes of key-value cache per token).",
    )
    resource_scope: str = _option(
        "model", "model counts everything. layers counts the stack of layers alone, as most papers do."
    )
    sequence_length: int | None = _option(
        None,
        "Tokens per sequence. The MACs of attention depend on it. Default: in a recipe the length of the data; in "
        "Python there is none. Ignored for images.",
    )
    prune: tuple[str, ...] | None = _option(
        None, "Names of the dims to prune. Default: all dims of the architecture; `hf-dms archs` lists them."
    )
    layout: str = _option(
        "uniform",
        "The checkpoint format. uniform: all layers share one prune ratio per dim, and the result is a stock model. "
        "per_layer: every layer has its own ratios, as in the paper, and the result is a dms_* model, which loads "
        "with hf_dms or with trust_remote_code. padded: the per_layer cut, filled with zeros up to the widest layer, "
        "so that it is a stock model; the target counts only the kept units, not the zeros.",
    )
    round_to: dict[str, int] = _mapping(
        "Multiple that the size of a dim is rounded to, per dim, e.g. {mlp: 64}. Default: 1."
    )
    protect: dict[str, Any] = _mapping(
        "What is never cut. layers: indices of layers that stay whole (negative ones count from the end). "
        "dims: names of dims that stay whole. min and max: smallest and largest size per dim, e.g. {min: {mlp: 256}}.",
    )
    sizes: dict[str, int] = _mapping(
        "The size of each pruned dim, such as {mlp: 1024, layers: 24}, in place of target and prune. The search then "
        "learns only which units stay."
    )
    pipeline: str = _option(
        "p",
        "p: pretrained weights train during the search. np: randomly initialised weights train during the search, best "
        "in a larger network (model.supernet); then the shape that was found trains from fresh weights. "
        "p-: pretrained weights are frozen, and only the prune ratios (and scales) train.",
    )
    strategy: str = _option(
        "dms",
        "How structure is chosen. dms: by the search. Any other strategy of docs/strategies.md, such as flap or "
        "taylor, looks at `train.max_steps` batches once, with frozen weights. Your own strategy is module:NAME.",
    )
    search_over: str = _option(
        "masks",
        "The model that the ratios are learned on. masks: units fade out, and the other weights do not change. "
        "refitted: the maps that write into the residual stream are refitted by least squares at every width, so the "
        "search sees the model as `repair_` will leave it. It needs frozen weights (pipeline p-) and a repair "
        "afterwards. Units of kv, heads and mlp are then ranked by the loss that their removal costs after the refit.",
    )
    sharpness: float | None = _option(
        None,
        "Sharpness λ / N of the soft mask of a dim of N units, where λ is its steepness. Default: λ = N, but at least "
        "min(8 N, 256), so that the mask of a short dim (heads, layers) is open at ratio 0.",
    )
    importance_decay: float = _option(0.99, "Decay of the moving average of the Taylor importance, in [0, 1).")
    warmup_steps: int = _option(
        8, "Steps at the start in which every mask is exactly 1 and only importance is gathered."
    )
    target_schedule: str = _option(
        "geometric",
        "How the target falls during the search. geometric: from 1 to target over the first `target_ramp` of the "
        "search, by an equal factor each step. constant: the target holds from the first step.",
    )
    target_ramp: float = _option(0.7, "Fraction of the search over which the target falls, in (0, 1].")
    decide_at: float = _option(
        0.85,
        "Fraction of the search after which layers, heads and KV groups get their final whole sizes and hard masks. "
        "MLP widths learn until the end. 1: nothing is decided before the cut.",
    )
    kl_weight: float = _option(
        0.0,
        "Share of KL(dense ‖ searched model) in the loss of the search, in [0, 1]; the rest is the task's loss. The "
        "dense logits come from the same frozen weights with open masks: one more forward pass without gradients per "
        "step. It needs pipeline p-. In the warm-up the divergence is 0, and the task's loss alone gives the "
        "importance.",
    )
    scales: Any = _option(
        False,
        "Whether each unit of kv, heads and mlp learns a scale beside its prune ratio. Scales start at 1, and the cut "
        "folds them into the weights that read the unit. norms: also one scale for each unit of each norm over the "
        "hidden size. Only for searches over masks with frozen weights (pipeline p-), and strategies that learn masks.",
    )
    scale_power: float = _option(
        0.0,
        "Units are ranked by their importance times their scale to this power; 0: by importance alone. Needs scales.",
    )
    resource_weight: float = _option(10.0, "λ_resource, the weight of the resource loss beside the task loss.")
    gate_learning_rate: float | None = _option(
        None, "Constant learning rate of the prune ratios. Default: 2 / steps of the search, within [0.002, 0.05]."
    )
    max_nonfinite_steps: int = _option(
        10,
        "A search or a training stops after this many steps in a row with a loss or gradients that are not finite. "
        "Each such step is skipped: weights, ratios and importance do not change.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.prune, list):  # YAML and JSON have no tuples
            self.prune = tuple(self.prune)
        self._check_target()
        self._check_choices()
        self._check_numbers()
        self._check_names()

    def _check_target(self) -> None:
        if self.target is None and self.sizes:
            return
        if self.target is None:
            raise HfDmsError(
                "dms.target is required: the fraction of the dense resource to keep. For 60 % write target: 0.6"
            )
        if isinstance(self.target, str):
            self.target = _number_or_amount(self.target)
        if isinstance(self.target, str):
            return  # an amount: it becomes a fraction when the model's cost is known (gating/share.py)
        if isinstance(self.target, bool) or not isinstance(self.target, int | float):
            raise HfDmsError(f"dms.target must be a number in (0, 1], got {self.target!r}. For 60 % write target: 0.6")
        if not 0 < self.target <= 1:
            # A number up to 100 was probably meant as a percentage, and one in the thousands as an amount.
            hint = f"For {self.target:g} % write target: {self.target / 100:g}" if 1 < self.target <= 100 else ""
            hint = f"For an amount write target: {self.target / 1e6:g}M" if self.target >= 1e3 else hint
            raise HfDmsError(f"dms.target must be in (0, 1], got {self.target:g}. {hint}".rstrip())

    def _check_choices(self) -> None:
        choices = {
            "resource": RESOURCES,
            "resource_scope": RESOURCE_SCOPES,
            "layout": LAYOUTS,
            "pipeline": PIPELINES,
            "target_schedule": TARGET_SCHEDULES,
            "search_over": SEARCHES_OVER,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise HfDmsError(f"dms.{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")

        if not isinstance(self.strategy, str):
            raise HfDmsError(f"dms.strategy must be the name of a strategy, such as flap, got {self.strategy!r}.")
        # A strategy would ignore these options of the search without a word. Some learn scales (one_shot.check_choice).
        meaningless = {
            "pipeline = np": self.pipeline == "np",
            f"search_over = {self.search_over}": self.search_over != "masks",
            f"kl_weight = {self.kl_weight}": self.kl_weight != 0,
            f"scale_power = {self.scale_power}": self.scale_power != 0,
        }
        if self.strategy != SEARCH and any(meaningless.values()):
            option = next(name for name, given in meaningless.items() if given)
            raise HfDmsError(
                f"dms.strategy = {self.strategy} chooses units of trained weights without a search, so that "
                f"dms.{option} has no meaning. Leave one of the two out."
            )
        if self.search_over == "refitted" and self.pipeline != "p-":
            raise HfDmsError(
                f"dms.search_over = refitted needs frozen weights, got pipeline {self.pipeline}. Write pipeline: p-"
            )

    def _check_numbers(self) -> None:
        ranges = {  # name: (lowest, highest, is the lowest allowed, is the highest allowed)
            "importance_decay": (0, 1, True, False),
            "target_ramp": (0, 1, False, True),
            "decide_at": (0, 1, False, True),
            "kl_weight": (0, 1, True, True),
            "warmup_steps": (0, math.inf, True, False),
            "scale_power": (0, 32, True, True),
            "resource_weight": (0, math.inf, True, False),
            "gate_learning_rate": (0, math.inf, True, False),
            "sharpness": (0, math.inf, False, False),
            "sequence_length": (1, math.inf, True, False),
            "max_nonfinite_steps": (1, math.inf, True, False),
        }
        for name, (low, high, with_low, with_high) in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            whole = name in ("warmup_steps", "sequence_length", "max_nonfinite_steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise HfDmsError(f"dms.{name} must be {'a whole' if whole else 'a'} number, got {value!r}.")
            if not ((value > low or (with_low and value == low)) and (value < high or (with_high and value == high))):
                interval = f"{'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}"
                raise HfDmsError(f"dms.{name} must be in {interval}, got {value}.")

        self._check_kl()
        self._check_scales()

    def _check_scales(self) -> None:
        if not isinstance(self.scales, bool) and self.scales != "norms":
            raise HfDmsError(f"dms.scales must be true, false or norms, got {self.scales!r}.")
        if self.scales and self.pipeline != "p-":
            raise HfDmsError(
                f"dms.scales needs frozen weights, got pipeline {self.pipeline}, in which weights learn their scale "
                "themselves. Write pipeline: p-, or leave scales out."
            )
        if self.scales and self.search_over != "masks":
            raise HfDmsError(
                f"dms.scales needs search_over = masks, got {self.search_over}, whose refits scale units already. "
                "Leave one of the two out."
            )

        if self.scale_power and not self.scales:
            raise HfDmsError(
                f"dms.scale_power = {self.scale_power} needs scales, which dms.scales turns on. Write scales: true, or "
                "leave scale_power out."
            )

    def _check_kl(self) -> None:
        if self.kl_weight and self.pipeline != "p-":
            raise HfDmsError(
                f"dms.kl_weight = {self.kl_weight} needs frozen weights, got pipeline {self.pipeline}: where weights "
                "train, the model with open masks is no longer the dense one. Write pipeline: p-, or teach the cut "
                "model by recover.distillation."
            )
        if self.kl_weight == 1 and self.warmup_steps == 0 and self.search_over == "masks":
            raise HfDmsError(
                "dms.kl_weight = 1 needs a warm-up, got dms.warmup_steps = 0: at open masks the divergence is 0, so "
                "that no unit would be more important than another. Write warmup_steps: 8, or a smaller kl_weight."
            )

    def _check_names(self) -> None:
        if self.prune is not None:
            if not isinstance(self.prune, tuple) or not all(isinstance(name, str) for name in self.prune):
                raise HfDmsError(f"dms.prune must be a list of dim names such as [kv, mlp], got {self.prune!r}.")
            if len(self.prune) == 0:
                raise HfDmsError("dms.prune is empty: name at least one dim, or leave it out to prune all.")
        for option, example in (("round_to", "{mlp: 64}"), ("sizes", "{mlp: 1024}")):
            given = getattr(self, option)
            # `type(...) is int`, because True is an instance of int.
            if not isinstance(given, dict) or not all(type(count) is int and count >= 1 for count in given.values()):
                raise HfDmsError(
                    f"dms.{option} must map a dim to a whole number of at least 1, as {example}; got {given!r}."
                )
        if self.sizes and self.pipeline == "np":
            raise HfDmsError(
                "dms.sizes needs pretrained weights, got pipeline np: a network of a given shape can be trained as it "
                "is. Leave sizes out, or write pipeline: p."
            )
        known = {"layers": list, "dims": list, "min": dict, "max": dict}
        if not isinstance(self.protect, dict):
            raise HfDmsError(f"dms.protect must be a mapping with keys of {', '.join(known)}; got {self.protect!r}.")
        for key, value in self.protect.items():
            if key not in known:
                raise HfDmsError(f"dms.protect has no key {key!r}; its keys are {', '.join(known)}.")
            if not isinstance(value, known[key] | tuple):
                raise HfDmsError(f"dms.protect.{key} must be a {known[key].__name__}, got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values, ready for JSON or YAML."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def check_length(self, num_steps: int) -> None:
        """Check that a search leaves steps in which the ratios may move.

        Args:
            num_steps: optimizer steps of the search.

        Raises:
            ValueError: all steps are warm-up.
        """
        if num_steps <= self.warmup_steps:
            raise HfDmsError(
                f"dms.warmup_steps = {self.warmup_steps} and the search has {num_steps} steps (train.max_steps): "
                "all of them only gather importance, and no prune ratio would ever move. Search longer, or lower "
                f"dms.warmup_steps to at most {max(num_steps - 1, 0)} (a tenth of the steps is plenty)."
            )

    def with_defaults_for(self, num_steps: int) -> DMSConfig:
        """A copy with values for the options whose default depends on the length of the search.

        Args:
            num_steps: optimizer steps of the search.
        """
        rate = self.gate_learning_rate
        if rate is None:
            # A step of Adam is about as long as its rate, so a ratio can cross [0, 1] in half of the search.
            rate = min(max(2 / max(num_steps, 1), 0.002), 0.05)
        return dataclasses.replace(self, gate_learning_rate=rate)
