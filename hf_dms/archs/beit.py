"""BEiT: ViT with a bias on attention scores that depends on the distance of two patches, and a scale on block outputs.

Read it next to transformers' `BeitLayer`. The bias is a table with a column for each head. There is one table per
layer, or one for all layers. A table for all layers forces the same heads on all layers, so heads are then a dim of the
model. The classifier reads the normed mean of the patches, or the class token.

`Data2VecVisionLayer` is the same under other names. As in BERT, its stock class computes the head size as
hidden_size / heads.
"""

from dataclasses import replace
from typing import Any

from .spec import Dim, with_dims
from .vit import VIT, sides
from .yolos import YOLOS

TABLE = "relative_position_bias.relative_position_bias_table"


def num_distances(config: Any) -> int:
    """Number of rows of a table: one per distance of two patches along both sides, and three for the class token."""
    (height, width), (patch_height, patch_width) = sides(config.image_size), sides(config.patch_size)
    # The three: from the class token to a patch, from a patch to it, and from it to itself.
    return (2 * (height // patch_height) - 1) * (2 * (width // patch_width) - 1) + 3


def _one_choice_of_heads(dims: tuple[Dim, ...]) -> dict[str, Any]:
    """The variant with one table for all layers."""
    of_model = Dim("heads", "num_attention_heads", scope="model")
    return {"use_shared_relative_position_bias": {True: {"dims": with_dims(dims, of_model)}}}


DIMS = with_dims(tuple(dim for dim in VIT.dims if dim.name != "pool"), Dim("distances", num_distances))
OUTSIDE = {name: axes for name, axes in VIT.params.items() if not name.startswith(("layers.", "pooler."))} | {
    "embeddings.mask_token": "one one hidden",
    # With `use_mean_pooling` the last norm is in the pooler, behind the mean; without, it is ViT's `layernorm`.
    "pooler.layernorm.weight": "hidden",
    "pooler.layernorm.bias": "hidden",
}

BEIT = replace(
    VIT,
    model_type="beit",
    dims=DIMS,
    params=OUTSIDE
    | {name: axes for name, axes in VIT.params.items() if name.startswith("layers.")}
    | {
        "layers.{i}.lambda_1": "hidden",
        "layers.{i}.lambda_2": "hidden",
        f"layers.{{i}}.{TABLE}": "distances heads",
        "shared_position_bias.relative_position_bias_table": "distances heads",
    },
    variants=_one_choice_of_heads(DIMS),
    # Names of layers, for backbones. The stock class derives them from the number of layers, which a cut changes.
    config_leaves_out=("stage_names", "out_features", "out_indices"),
    outputs={},  # `pooler_output` is as wide as the stream: the pooler has no map
)

DATA2VEC_DIMS = with_dims(DIMS, Dim("d", "hidden_size // num_attention_heads"))
DATA2VEC_VISION = replace(
    BEIT,
    model_type="data2vec-vision",
    layers=YOLOS.layers,
    dims=DATA2VEC_DIMS,
    params=OUTSIDE
    | {name: axes for name, axes in YOLOS.params.items() if ".layer." in name}
    | {
        "encoder.layer.{i}.lambda_1": "hidden",
        "encoder.layer.{i}.lambda_2": "hidden",
        f"encoder.layer.{{i}}.attention.attention.{TABLE}": "distances heads",
        f"encoder.{TABLE}": "distances heads",
    },
    variants=_one_choice_of_heads(DATA2VEC_DIMS),
    config_leaves_out=(),  # not the config of a backbone: it names no layers
    attributes=YOLOS.attributes,
    build_with=YOLOS.build_with,
    must_equal=YOLOS.must_equal,
)
