"""YOLOS: a ViT with detection tokens behind its patches, whose outputs two small MLPs turn into classes and boxes.

Read it beside `YolosLayer` and `YolosForObjectDetection`. The stock class divides hidden_size by the heads, as BERT's
does. The inner widths of the heads are the hidden size. A variant with position embeddings between the layers
(`use_mid_position_embeddings`) is not covered: a dropped layer would leave its embedding behind.
"""

from __future__ import annotations

from .spec import ArchSpec, Dim
from .vit import num_patches, sides

INNER = ("class_1", "class_2", "box_1", "box_2")  # widths inside them, in order


def _predictor(path: str, first: str, second: str, given: str) -> dict[str, str]:
    """The lines of an MLP of three linear maps on the detection tokens."""
    layers = {"0": f"{first} hidden", "1": f"{second} {first}", "2": f"{given} {second}"}
    lines = {f"{path}.layers.{layer}.weight": f"{axes} @ detections" for layer, axes in layers.items()}
    return lines | {f"{path}.layers.{layer}.bias": axes.partition(" ")[0] for layer, axes in layers.items()}


YOLOS = ArchSpec(
    model_type="yolos",
    layers="encoder.layer",
    dims=(
        Dim("heads", "num_attention_heads", scope="layer"),
        Dim("mlp", "intermediate_size", scope="layer"),
        Dim("hidden", "hidden_size", scope="model"),
        Dim("layers", "num_hidden_layers", scope="depth"),
        Dim("pool", "hidden_size", scope="model", follows="hidden"),
        *(Dim(name, "hidden_size", scope="model", follows="hidden") for name in INNER),
        Dim("d", "hidden_size // num_attention_heads"),
        Dim("classes", lambda config: config.num_labels + 1),  # one for no object
        Dim("coordinates", "4"),
        Dim("one", "1"),
        Dim("detections", "num_detection_tokens"),
        Dim("patches", num_patches),
        Dim("tokens", lambda config: num_patches(config) + config.num_detection_tokens + 1),
        Dim("channels", "num_channels"),
        Dim("height", lambda config: sides(config.image_size)[0]),
        Dim("width", lambda config: sides(config.image_size)[1]),
        Dim("patch_height", lambda config: sides(config.patch_size)[0]),
        Dim("patch_width", lambda config: sides(config.patch_size)[1]),
    ),
    params={
        "embeddings.cls_token": "one one hidden",
        "embeddings.detection_tokens": "one detections hidden",
        "embeddings.position_embeddings": "one tokens hidden",
        "embeddings.patch_embeddings.projection.weight": "hidden channels patch_height patch_width @ patches",
        "embeddings.patch_embeddings.projection.bias": "hidden",
        "encoder.layer.{i}.attention.attention.query.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.attention.query.bias": "(heads d)",
        "encoder.layer.{i}.attention.attention.key.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.attention.key.bias": "(heads d)",
        "encoder.layer.{i}.attention.attention.value.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.attention.value.bias": "(heads d)",
        "encoder.layer.{i}.attention.output.dense.weight": "hidden (heads d)",
        "encoder.layer.{i}.attention.output.dense.bias": "hidden",
        "encoder.layer.{i}.intermediate.dense.weight": "mlp hidden",
        "encoder.layer.{i}.intermediate.dense.bias": "mlp",
        "encoder.layer.{i}.output.dense.weight": "hidden mlp",
        "encoder.layer.{i}.output.dense.bias": "hidden",
        "encoder.layer.{i}.layernorm_before.weight": "hidden",
        "encoder.layer.{i}.layernorm_before.bias": "hidden",
        "encoder.layer.{i}.layernorm_after.weight": "hidden",
        "encoder.layer.{i}.layernorm_after.bias": "hidden",
        "layernorm.weight": "hidden",
        "layernorm.bias": "hidden",
        "pooler.dense.weight": "pool hidden @ 1",
        "pooler.dense.bias": "pool",
    },
    heads={
        "ForObjectDetection": {
            **_predictor("class_labels_classifier", "class_1", "class_2", "classes"),
            **_predictor("bbox_predictor", "box_1", "box_2", "coordinates"),
        }
    },
    config={
        "num_attention_heads": "heads",
        "head_dim": "d",
        "intermediate_size": "mlp",
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
    },
    must_be_false=("use_mid_position_embeddings",),
    attributes={
        "encoder.layer.{i}.attention.attention.num_attention_heads": "heads",
        "encoder.layer.{i}.attention.attention.attention_head_size": "d",
        "encoder.layer.{i}.attention.attention.all_head_size": "heads d",
        "encoder.layer.{i}.attention.attention.scaling": "d ** -0.5",
    },
    build_with={"num_attention_heads": 1},  # any hidden size is a multiple of it
    attention="heads d",
    outputs={"pooler_output": "pool"},
    tokens="tokens",
    image="channels height width",
    must_equal=(("heads d", "hidden"),),
)
