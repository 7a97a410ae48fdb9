"""RT-DETR: attention on the coarsest feature map, convolutions that join the maps, and a decoder that samples them.

Read it next to transformers' `RTDetrDecoderLayer` and `RTDetrHybridEncoder`. The layers are DETR's; the decoder's
cross-attention is deformable: each head reads a few points of every level. Backbone, the convolutions of the encoder
and all prediction heads stay whole. After every decoder layer, prediction heads of its own move the boxes that the next
layer looks at, so no decoder layer is dropped.
"""

from __future__ import annotations

from dataclasses import replace

from .detr import DETR, linear
from .spec import Dim, with_dims

CROSS = "decoder.layers.{i}.encoder_attn"
CONVOLUTIONS = ("lateral_convs", "fpn_blocks", "downsample_convs", "pan_blocks")
OUTSIDE = ("backbone", "encoder_input_proj", "decoder_input_proj", "denoising_class_embed", "weight_embedding")
PREDICTIONS = ("enc_output", "enc_score_head", "enc_bbox_head")
OF_DECODER = ("query_pos_head", "class_embed", "bbox_embed")


def _here(name: str) -> str:
    """A module of DETR's encoder under its name here."""
    # A list of encoders, one per entry of `encode_proj_layers`. By default it has one entry, the coarsest map.
    return name.replace("encoder.layers.", "encoder.aifi.0.layers.") if name.startswith("encoder.") else name


def _lines() -> dict[str, str]:
    """DETR's lines for the layers, except for the cross-attention."""
    other = (f"{CROSS}.", "decoder.layernorm")
    kept = {_here(name): line for name, line in DETR.params.items() if not name.startswith(other)}
    encoder = {name: line.replace("hidden", "encoder_hidden") for name, line in kept.items() if name.startswith("enc")}
    return encoder | {name: line for name, line in kept.items() if name.startswith("decoder.")}


RT_DETR = replace(
    DETR,
    model_type="rt_detr",
    layers={"encoder_layers": "encoder.aifi.0.layers", "decoder_layers": "decoder.layers"},
    dims=with_dims(
        tuple(dim for dim in DETR.dims if dim.name not in ("classes", "coordinates")),
        Dim("encoder_d", "encoder_hidden_dim // encoder_attention_heads"),
        Dim("encoder_hidden", "encoder_hidden_dim"),  # projections between the two let the decoder have another width
        Dim("levels", "num_feature_levels"),
        Dim("points", "decoder_n_points"),
        Dim("two", "2"),
        Dim("channels", lambda config: config.backbone_config.num_channels),  # RTDetrConfig itself has none
    ),
    params=_lines()
    | linear(f"{CROSS}.sampling_offsets", "(cross_heads levels points two)", "hidden")
    | linear(f"{CROSS}.attention_weights", "(cross_heads levels points)", "hidden")
    | linear(f"{CROSS}.value_proj", "(cross_heads decoder_d)", "hidden")
    | linear(f"{CROSS}.output_proj", "hidden", "(cross_heads decoder_d)"),
    # All of them stay whole, also where they repeat for every layer.
    heads={},
    whole=(
        *(*OUTSIDE, *PREDICTIONS),
        *(f"encoder.{name}" for name in CONVOLUTIONS),
        *(f"decoder.{name}" for name in OF_DECODER),
    ),
    # A layer looks where the prediction heads of the layer before it point. Without that layer it would look elsewhere.
    chained=("decoder_layers",),
    query_scores="enc_score_head",
    must_have_one_entry=("encode_proj_layers",),  # attention on one feature map: `aifi` has one encoder
    must_be_false=(),  # no norm behind the layers, so `auxiliary_loss` does not matter
    # The deformable attention stores no size of a head: it divides d_model by n_heads.
    attributes={_here(name): size for name, size in DETR.attributes.items() if not name.startswith(CROSS)}
    | {f"{CROSS}.n_heads": "cross_heads", f"{CROSS}.d_model": "cross_heads decoder_d"},
    # The cross-attention computes no scores: a linear map gives the weight of each point.
    attentions={_here(name): size for name, size in DETR.attentions.items() if name != CROSS},
    must_equal=(
        ("encoder_heads encoder_d", "encoder_hidden"),
        ("decoder_heads decoder_d", "hidden"),
        ("cross_heads decoder_d", "hidden"),
    ),
)
