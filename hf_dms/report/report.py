"""`Report`: the results of a prune. `dms_report.json`, everything that is shown of it, and its JSON Schema follow from
it.

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
    """Numbers of one model. None stands for a float that is not finite."""

    num_params: Annotated[int, "Parameters, tied ones once."]
    macs_per_token: Annotated[
        int,
        "Multiply-accumulates of a forward pass of one sequence of dms.sequence_length tokens, per token; for images a "
        "patch counts as one, or the whole image, which macs_per then says.",
    ]
    kv_bytes_per_token: Annotated[int, "Bytes of the key-value cache, in the model's own precision."]
    kept_num_params: Annotated[int, "For a padded model: parameters without the zeros. The target limits this number."]
    kept_macs_per_token: int
    kept_kv_bytes_per_token: int
    perplexity: Annotated[float | None, "On held-out sequences, each scored separately."]
    accuracy: Annotated[float, "On held-out examples."]
    mean_average_precision: Annotated[
        float | None, "COCO's, of the boxes in held-out images; null if there is no true box."
    ]
    stderr: Annotated[
        float | None,
        "Standard error of the metric over the examples (for mAP by the jackknife); null for a single example.",
    ]
    difference: Annotated[
        float | None, "Mean paired difference from the dense model: accuracy, mAP, or nats per token."
    ]
    difference_stderr: float | None
    tokens_per_second: Annotated[float, "Prefilling one batch, median of three."]
    texts_per_second: float
    images_per_second: float


class Masks(TypedDict):
    """Quality on the masks of a search, before the cut. One-shot strategies have no such masks."""

    soft: Annotated[
        Measured,
        "Quality on the soft masks at the end of the search. The difference from `pruned` is the cost of rounding.",
    ]


class _Step(TypedDict):
    step: int
    resource: Annotated[float, "Resource of the soft masks, as a share of the dense model's."]
    target: Annotated[float, "The falling target of the resource at this step."]
    task_loss: Annotated[float | None, "Mean over the logging interval, on soft masks."]


class Step(_Step, total=False):
    """One log of a search."""

    epoch: float
    loss: Annotated[float | None, "Sum of task loss and resource loss, as the Trainer logs it."]
    resource_loss: float
    learning_rate: float
    grad_norm: Annotated[float | None, "Norm of the gradients of the weights."]
    gate_grad_norm: Annotated[float | None, "Norm of the gradients of the prune ratios."]
    skipped_steps: Annotated[int, "Steps so far that were skipped, because loss or gradients were not finite."]


DIMS = Annotated[
    float | None,
    "kept/DIM, kept_min/DIM, kept_max/DIM: learned sizes rounded to whole units; mean, smallest and largest over the "
    "layers. soft_fraction/DIM: share of the units with a mask that is neither open nor closed.",
]


class _Sample(TypedDict):
    input: Annotated[str, "A text, or a small PNG as a data URI."]
    outputs: Annotated[
        dict[str, str],
        "By model of this report: its continuation, including the prompt, the class that it predicts, or the objects "
        "that it finds.",
    ]


class Sample(_Sample, total=False):
    """An input, and the models' outputs for it."""

    label: Annotated[str, "The true class, or the true objects."]
    pictures: Annotated[
        dict[str, str], "For a detector, by model of this report: the image with the boxes it finds, as a data URI."
    ]
    probabilities: Annotated[dict[str, float | None], "By model of this report: the probability of that class."]


class _Original(TypedDict):
    num_params: int
    macs_per_token: int
    target: Annotated[
        float, "The requested share of its resource. recipe.dms.target is the share of the supernet's resource."
    ]


class Original(_Original, total=False):
    """The model at model.path, for a search in a supernet."""

    kv_bytes_per_token: int


class Source(TypedDict):
    """A dense model."""

    path: str
    revision: str | None


@dataclass
class Report:
    """The results of a prune. Numbers that are not finite are null. Keys may be added without a new format.

    A key that is None is left out of the file.
    """

    dense: Annotated[
        Measured,
        "The dense model, fine-tuned if the recipe has a finetune section. With pipeline np and no fine-tuning it has "
        "random weights. With model.supernet it is the supernet.",
    ]
    pruned: Annotated[
        Measured, "The pruned model right after the cut. Its sizes, costs and speed are those of the saved model."
    ]
    sizes: Annotated[
        dict[str, list[Annotated[int, {"minimum": 0}]]],
        "Units kept, by dim: one number per layer of the dense model, 0 for a dropped layer; or a single number for a "
        "dim of the whole model.",
    ]
    units: Annotated[
        dict[str, Annotated[int, {"minimum": 1}]],
        "Units of the dense model, by dim: the number per layer, or of the whole model.",
    ]
    kept_layers: Annotated[list[Annotated[int, {"minimum": 0}]], "Indices of the dense model's layers that stay."]
    layout: Annotated[str, {"enum": list(LAYOUTS)}, "The requested checkpoint format, dms.layout."]
    model_class: Annotated[str, "Class of the saved model. Names of per-layer classes begin with Dms."]
    versions: Annotated[dict[str, str], "Versions of hf_dms, Python and the packages that were used."]
    seconds: Annotated[int, "Time from the start to the save; if the run was resumed, of its last part."]
    repaired: Annotated[Measured | None, "Quality after recover.repair, if the recipe has it."] = None
    recovered: Annotated[Measured | None, "Quality after the training in recover, if the recipe has one."] = None
    original: Annotated[
        Original | None, "With model.supernet: the costs of the model at model.path, which is never trained."
    ] = None
    macs_per: Annotated[
        Literal["image"] | None,
        "image if macs_per_token counts a whole image, as in convolutional networks, networks in stages and DETRs.",
    ] = None
    masks: Masks | None = None
    texts: Annotated[
        dict[str, dict[str, Measured]] | None,
        "Quality on eval.texts: by name of the text, and by the model's key in this report.",
    ] = None
    outcome: Annotated[
        SearchOutcome | None,
        "How the search ended: the target, and the shares that the learned ratios and the cut keep. message warns if "
        "the search missed the target.",
    ] = None
    protocol: Annotated[str | None, "The data that quality was measured on, in words."] = None
    search: Annotated[
        list[Annotated[Step, {"additionalProperties": DIMS}]] | None,
        "The course of the search: the Trainer's log of each logging interval.",
    ] = None
    samples: Annotated[
        list[Sample] | None,
        "Inputs with the outputs of the dense and the last model of this report: a recipe's prompts, or some held-out "
        "examples of a classifier or detector.",
    ] = None
    recipe: Annotated[
        dict[str, Any] | None, "The recipe as it ran, with every default. Local paths are shortened to .../name."
    ] = None
    data: Annotated[
        dict[str, str] | None,
        "SHA-256 of local data, by the recipe's key: of a file's content, or of the names and sizes in a folder.",
    ] = None
    seed: int | None = None
    model: Annotated[Source | None, "For a cut by a plan: the dense model."] = None
    proof: Annotated[
        Literal["tensors"] | None,
        "For a cut by a plan: every written tensor was read back, and equals the slice of its source.",
    ] = None
    left_out: Annotated[
        list[str] | None, "For a cut by a plan: tensors in the files for which the model has no parameter."
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
    # A report is one of three: of a search, of a choice without one (its `search` is empty), or of a cut by a plan.
    choice = {
        "required": [key for key in OF_A_SEARCH if key != "masks"],
        "properties": {"masks": False, "search": {"maxItems": 0}},
    }
    form = {"const": FORMAT, "description": "Format of this file. It increases when the meaning of a key changes."}
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
    """The schema of a type. Annotations are its description, or further keys of the schema."""
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
