"""`Report`: what a prune came to. `dms_report.json`, all that is shown of it, and its JSON Schema are made of this.

`python -m hf_dms.report.report` prints the schema, `dms_report.schema.json`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from ..config import LAYOUTS
from ..gating.outcome import SearchOutcome

FORMAT = 1  # of dms_report.json; a change of what a key means raises it
OF_A_SEARCH = ("recipe", "seed", "protocol", "search", "masks", "samples")
OF_A_CUT_BY_A_PLAN = ("model", "proof", "left_out")


class Measured(TypedDict, total=False):
    """Numbers of one model. A float that may be None is one that may be not finite."""

    num_params: Annotated[int, "Parameters, tied ones once."]
    macs_per_token: Annotated[
        int,
        "Multiply-accumulates of a forward pass of one sequence of dms.sequence_length tokens, per token; for images a "
        "patch counts as one.",
    ]
    kv_bytes_per_token: Annotated[int, "Of the cache, in the model's own precision."]
    kept_num_params: Annotated[int, "Of a padded model: without the zeros. The target limits this."]
    kept_macs_per_token: int
    kept_kv_bytes_per_token: int
    perplexity: Annotated[float | None, "Of held-out sequences, each scored by itself."]
    accuracy: Annotated[float, "Of held-out examples."]
    stderr: Annotated[float | None, "Standard error of the metric over the examples; null of one example."]
    difference: Annotated[float | None, "Mean paired difference from the dense model: accuracy, or nats per token."]
    difference_stderr: float | None
    tokens_per_second: Annotated[float, "Prefilling one batch, median of three."]
    texts_per_second: float
    images_per_second: float


class Masks(TypedDict):
    """Quality before the cut, which a choice without a search does not have."""

    soft: Annotated[
        Measured,
        "Quality on the soft masks that the search ended with; what `pruned` differs by is the cost of rounding.",
    ]


class _Step(TypedDict):
    step: int
    resource: Annotated[float, "Of the soft masks, as a share of the dense model's."]
    target: Annotated[float, "What the resource is driven to at this step."]
    task_loss: Annotated[float | None, "Mean over the interval, on soft masks."]


class Step(_Step, total=False):
    """One log of a search."""

    epoch: float
    loss: Annotated[float | None, "Task loss and resource loss, as the Trainer adds them up."]
    resource_loss: float
    learning_rate: float
    grad_norm: Annotated[float | None, "Of the weights."]
    gate_grad_norm: Annotated[float | None, "Of the prune ratios."]
    skipped_steps: Annotated[int, "Whose loss or gradients were not finite, so far."]


DIMS = Annotated[
    float | None,
    "kept/DIM, kept_min/DIM, kept_max/DIM: whole units nearest to the learned sizes, mean, smallest and largest over "
    "the layers; soft_fraction/DIM: share of the units whose mask is neither open nor closed.",
]


class _Sample(TypedDict):
    input: Annotated[str, "A text, or a small PNG as a data URI."]
    outputs: Annotated[dict[str, str], "Model of this report to its continuation, prompt included, or its class."]


class Sample(_Sample, total=False):
    """An input, and what models make of it."""

    label: str
    probabilities: Annotated[dict[str, float | None], "Model of this report to its probability of that class."]


class _Original(TypedDict):
    num_params: int
    macs_per_token: int
    target: Annotated[
        float, "The share of its resource that was asked for; recipe.dms.target is that of the supernet's."
    ]


class Original(_Original, total=False):
    """The model whose config is at model.path, beside a supernet."""

    kv_bytes_per_token: int


class Source(TypedDict):
    """A dense model."""

    path: str
    revision: str | None


@dataclass
class Report:
    """What a prune came to. Numbers that are not finite are null. Keys may be added without a new format.

    A key that is None is left out of the file.
    """

    dense: Annotated[
        Measured,
        "The dense model, fine-tuned if the recipe says so; with pipeline np, and no fine-tuning, one with random "
        "weights; with model.supernet the supernet.",
    ]
    pruned: Annotated[
        Measured, "The pruned model right after the cut; its sizes, costs and speed are those of the folder."
    ]
    sizes: Annotated[
        dict[str, list[Annotated[int, {"minimum": 0}]]],
        "Units kept: dim to one number per layer of the dense model, 0 where the layer is gone, or one number for a "
        "dim of the whole model.",
    ]
    units: Annotated[
        dict[str, Annotated[int, {"minimum": 1}]],
        "Units of the dense model: dim to the number per layer, or of the whole model.",
    ]
    kept_layers: Annotated[list[Annotated[int, {"minimum": 0}]], "Indices of the dense model's layers that stay."]
    layout: Annotated[str, {"enum": list(LAYOUTS)}, "What was asked for."]
    model_class: Annotated[str, "What is written; that of a per-layer model begins with Dms."]
    versions: Annotated[dict[str, str], "Of hf_dms, Python and the packages it ran with."]
    seconds: Annotated[int, "From the start to the save, of the last run if it was resumed."]
    repaired: Annotated[Measured | None, "After recover.repair, if the recipe has it: quality alone."] = None
    recovered: Annotated[Measured | None, "After the retraining of recover, if the recipe has it: quality alone."] = (
        None
    )
    original: Annotated[
        Original | None, "With model.supernet: the costs of the model that the supernet is larger than. Never trained."
    ] = None
    masks: Masks | None = None
    texts: Annotated[
        dict[str, dict[str, Measured]] | None,
        "Of eval.texts: name to what each model of this report measured there, by the model's key here: quality alone.",
    ] = None
    outcome: Annotated[
        SearchOutcome | None,
        "How the search ended: the shares that its ratios and the cut's whole sizes keep, beside the target; in words "
        "if it ended off that.",
    ] = None
    protocol: Annotated[str | None, "What quality was measured on, in words."] = None
    search: Annotated[
        list[Annotated[Step, {"additionalProperties": DIMS}]] | None,
        "The course of the search: the Trainer's logs, of each logging interval.",
    ] = None
    samples: Annotated[
        list[Sample] | None,
        "Inputs with what the dense and the last model of this report make of each: a recipe's prompts, or some "
        "held-out examples of a classifier.",
    ] = None
    recipe: Annotated[
        dict[str, Any] | None, "As it ran, with every default; local paths by their last part, .../name."
    ] = None
    seed: int | None = None
    model: Annotated[Source | None, "Of a cut by a plan: the dense model."] = None
    proof: Annotated[
        Literal["tensors"] | None,
        "Of a cut by a plan: every written tensor was read back and equals the slice of its source.",
    ] = None
    left_out: Annotated[
        list[str] | None, "Of a cut by a plan: tensors of the files that the model has no parameters for."
    ] = None

    def values(self) -> dict[str, Any]:
        """The keys that this report has, with their values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if value is not None}


# ---- the schema ------------------------------------------------------------------------------------------------------
KINDS = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object", list: "array"}


def schema() -> dict[str, Any]:
    """The JSON Schema of `dms_report.json`."""
    fields = dataclasses.fields(Report)
    hints = typing.get_type_hints(Report, include_extras=True)
    optional = {field.name for field in fields if field.default is None}
    choice = {
        "required": [key for key in OF_A_SEARCH if key != "masks"],
        "properties": {"masks": False, "search": {"maxItems": 0}},
    }
    form = {"const": FORMAT, "description": "Of this file; a change of what a key means raises it."}
    keys = {name: _schema_of(_without_none(hint) if name in optional else hint) for name, hint in hints.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"dms_report.json of hf_dms, format {FORMAT}",
        "description": (Report.__doc__ or "").partition("\n")[0],
        "type": "object",
        "required": ["format", *(field.name for field in fields if field.name not in optional)],
        "oneOf": [{"required": list(OF_A_SEARCH)}, choice, {"required": list(OF_A_CUT_BY_A_PLAN)}],
        "properties": {"format": form} | keys,
        "additionalProperties": False,
        "$defs": {"Measured": _schema_of_dict(Measured)},
    }


def _schema_of(hint: Any) -> dict[str, Any]:
    """The schema of a type; what annotates it is its description, or keys of the schema that are given as types."""
    if typing.get_origin(hint) is Annotated:
        inner, *notes = typing.get_args(hint)
        found = _schema_of(inner)
        for note in notes:
            found |= {"description": note} if isinstance(note, str) else note
        if typing.get_origin(found.get("additionalProperties")) is Annotated:
            found["additionalProperties"] = _schema_of(found["additionalProperties"])
        return found
    if hint is Measured:
        return {"$ref": "#/$defs/Measured"}
    if typing.is_typeddict(hint):
        return _schema_of_dict(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"type": [KINDS[_without_none(hint)], "null"]}
    found = {"type": KINDS[origin or hint]}
    if origin is list:
        found |= {"items": _schema_of(arguments[0])}
    if origin is dict and arguments[1] is not Any:
        found |= {"additionalProperties": _schema_of(arguments[1])}
    return found


def _schema_of_dict(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    found: dict[str, Any] = {"type": "object", "properties": {name: _schema_of(hint) for name, hint in hints.items()}}
    if required := [name for name in hints if name in kind.__required_keys__]:
        found["required"] = required
    return found | {"additionalProperties": False}


def _without_none(hint: Any) -> Any:
    """A type without None, its annotations kept."""
    if typing.get_origin(hint) is Annotated:
        inner, *notes = typing.get_args(hint)
        return Annotated[(_without_none(inner), *notes)]
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if type(None) in typing.get_args(hint) else hint


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
