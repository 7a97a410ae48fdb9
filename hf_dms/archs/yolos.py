"""YOLOS: a ViT with detection tokens after its patches. Two small MLPs turn their outputs into classes and boxes.

Read it next to transformers' `YolosLayer` and `YolosForObjectDetection`. The layers are BERT's with norms in front of
attention and MLP. As in BERT, the stock class computes the head size as hidden_size / heads. The inner widths of the
two MLPs are the hidden size. A variant with position embeddings between the layers (`use_mid_position_embeddings`) is
not supported: a dropped layer would leave its embedding behind.
"""

from __future__ import annotations

from dataclasses import replace

from .bert import BERT
from .spec import Dim, with_dims
from .vit import VIT, num_patches

INNER = ("class_1", "class_2", "box_1", "box_2")  # inner widths of the two MLPs, in order


def _predictor(path: str, first: str, second: str, given: str) -> dict[str, str]:
    """Lines for an MLP of three linear maps on the detection tokens."""
    layers = {"0": f"{first} hidden", "1": f"{second} {first}", "2": f"{given} {second}"}
    # The class hands them the last tokens alone.
    lines = {f"{path}.layers.{layer}.weight": f"{axes} @ detections" for layer, axes in layers.items()}
    return lines | {f"{path}.layers.{layer}.bias": axes.partition(" ")[0] for layer, axes in layers.items()}


def _as_here(lines: dict[str, str]) -> dict[str, str]:
    """Lines of BERT under the module names of YOLOS."""
    return {name.replace(".attention.self.", ".attention.attention."): line for name, line in lines.items()}


YOLOS = replace(
    VIT,
    model_type="yolos",
    layers=BERT.layers,
    dims=with_dims(
        tuple(dim for dim in VIT.dims if dim.name != "label"),
        Dim("pool", "hidden_size", scope="model", follows="hidden"),
        Dim("d", "hidden_size // num_attention_heads"),
        Dim("tokens", lambda config: num_patches(config) + config.num_detection_tokens + 1),
        Dim("classes", lambda config: config.num_labels + 1),  # one for no object
        Dim("coordinates", "4"),
        Dim("detections", "num_detection_tokens"),
        *(Dim(name, "hidden_size", scope="model", follows="hidden") for name in INNER),
    ),
    params={name: axes for name, axes in VIT.params.items() if not name.startswith("layers.")}
    # BERT's norms stand behind attention and MLP. Those of YOLOS stand in front of them, under ViT's names.
    | _as_here({name: axes for name, axes in BERT.params.items() if ".layer." in name and "LayerNorm" not in name})
    | {
        "embeddings.detection_tokens": "one detections hidden",
        "encoder.layer.{i}.layernorm_before.weight": "hidden",
        "encoder.layer.{i}.layernorm_before.bias": "hidden",
        "encoder.layer.{i}.layernorm_after.weight": "hidden",
        "encoder.layer.{i}.layernorm_after.bias": "hidden",
    },
    heads={
        "ForObjectDetection": {
            **_predictor("class_labels_classifier", "class_1", "class_2", "classes"),
            **_predictor("bbox_predictor", "box_1", "box_2", "coordinates"),
        }
    },
    must_be_false=("use_mid_position_embeddings",),
    attributes=_as_here(BERT.attributes),
    build_with=BERT.build_with,
    must_equal=BERT.must_equal,
)
