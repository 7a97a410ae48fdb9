"""Conditional DETR: a DETR with maps of their own for positions, and classes that are scored one by one.

Read it next to transformers' `ConditionalDetrDecoderLayer`. Queries and keys of the cross-attention are twice as wide
as its values: contents and positions side by side. In front of every decoder layer but the first, a small network
(`query_scale`) scales the positions by what the layer before returned. It stays whole, and so does the number of
decoder layers. The first decoder layer has one map more than the others.
"""

from __future__ import annotations

from dataclasses import replace

from .detr import DETR, attention
from .spec import Dim, with_dims

SELF, CROSS = "decoder.layers.{i}.self_attn", "decoder.layers.{i}.encoder_attn"
POSITIONED = ("q_content_proj", "k_content_proj", "k_pos_proj", "v_proj")  # maps of both attentions

CONDITIONAL_DETR = replace(
    DETR,
    model_type="conditional_detr",
    dims=with_dims(DETR.dims, Dim("classes", "num_labels"), Dim("two", "2")),  # no class for no object
    params={name: line for name, line in DETR.params.items() if not name.startswith((f"{SELF}.", f"{CROSS}."))}
    | attention(SELF, "decoder_heads", "decoder_d", (*POSITIONED, "q_pos_proj"))
    | attention(CROSS, "cross_heads", "decoder_d", (*POSITIONED, "q_pos_sine_proj"))
    | {
        # The stock class sets it to None in all later layers.
        "decoder.layers.0.encoder_attn.q_pos_proj.weight": "(cross_heads decoder_d) hidden",
        "decoder.layers.0.encoder_attn.q_pos_proj.bias": "(cross_heads decoder_d)",
    },
    whole=(*DETR.whole, "decoder.query_scale", "decoder.ref_point_head"),
    chained=("decoder_layers",),
    # The cross-attention alone stores its number of heads: it puts content and position side by side head by head, so
    # that the scores of a head are sums over 2·decoder_d products.
    attributes=DETR.attributes
    | {f"{CROSS}.num_attention_heads": "cross_heads", f"{CROSS}.scaling": "two decoder_d ** -0.5"},
)
