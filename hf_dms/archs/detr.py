"""DETR: an encoder on a backbone's feature map, and a decoder whose queries become boxes.

Read it next to transformers' `DetrEncoderLayer` and `DetrDecoderLayer`. Encoder and decoder are two stacks of layers.
A decoder layer has two attentions, and the heads of each are a dim of their own. The backbone stays whole: it has a
config of its own and any architecture. So does the width of the residual streams, which the positions and the sums of
encoder and decoder share. The stock class computes the size of a head from that width, so heads are only pruned in a
format of their own.

With `auxiliary_loss` the stock decoder normalises the stream after every layer, so that a dropped layer would leave its
norm behind. The config has no image size: MACs are counted for 224 × 224 pixels, or for an `image_size` that was added
to it.
"""

from __future__ import annotations

from .spec import ArchSpec, Dim
from .vit import IMAGE

ATTENTIONS = {  # path → heads, size of a head
    "encoder.layers.{i}.self_attn": ("encoder_heads", "encoder_d"),
    "decoder.layers.{i}.self_attn": ("decoder_heads", "decoder_d"),
    "decoder.layers.{i}.encoder_attn": ("cross_heads", "decoder_d"),  # the stock class gives both attentions one size
}
NORMS = (
    *(f"encoder.layers.{{i}}.{name}_layer_norm" for name in ("self_attn", "final")),
    *(f"decoder.layers.{{i}}.{name}_layer_norm" for name in ("self_attn", "encoder_attn", "final")),
    "decoder.layernorm",
)


def linear(path: str, outputs: str, inputs: str) -> dict[str, str]:
    """Lines for a linear map with a bias."""
    return {f"{path}.weight": f"{outputs} {inputs}", f"{path}.bias": outputs}


def attention(path: str, heads: str, d: str, maps: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> dict[str, str]:
    """Lines for an attention, with the maps that read the stream."""
    lines: dict[str, str] = {}
    for name in maps:
        lines |= linear(f"{path}.{name}", f"({heads} {d})", "hidden")
    return lines | linear(f"{path}.o_proj", "hidden", f"({heads} {d})")


def mlp(path: str, units: str) -> dict[str, str]:
    """Lines for the MLP of a layer."""
    return linear(f"{path}.fc1", units, "hidden") | linear(f"{path}.fc2", "hidden", units)


DETR = ArchSpec(
    model_type="detr",
    layers={"encoder_layers": "encoder.layers", "decoder_layers": "decoder.layers"},
    families={  # written by hand, since these are not stages
        "heads": ("encoder_heads", "decoder_heads", "cross_heads"),
        "mlp": ("encoder_mlp", "decoder_mlp"),
        "layers": ("encoder_layers", "decoder_layers"),
    },
    dims=(
        Dim("encoder_heads", "encoder_attention_heads", scope="layer", stack="encoder_layers"),
        Dim("decoder_heads", "decoder_attention_heads", scope="layer", stack="decoder_layers"),
        Dim("cross_heads", "decoder_attention_heads", scope="layer", stack="decoder_layers"),
        Dim("encoder_mlp", "encoder_ffn_dim", scope="layer", stack="encoder_layers"),
        Dim("decoder_mlp", "decoder_ffn_dim", scope="layer", stack="decoder_layers"),
        Dim("encoder_layers", "encoder_layers", scope="depth"),
        Dim("decoder_layers", "decoder_layers", scope="depth"),
        Dim("hidden", "d_model"),
        Dim("encoder_d", "d_model // encoder_attention_heads"),
        Dim("decoder_d", "d_model // decoder_attention_heads"),
        Dim("classes", lambda config: config.num_labels + 1),  # one for no object
        Dim("coordinates", "4"),
        Dim("one", "1"),
        *IMAGE,
    ),
    params={name: line for path, dims in ATTENTIONS.items() for name, line in attention(path, *dims).items()}
    | mlp("encoder.layers.{i}.mlp", "encoder_mlp")
    | mlp("decoder.layers.{i}.mlp", "decoder_mlp")
    | {f"{path}.{name}": "hidden" for path in NORMS for name in ("weight", "bias")},
    heads={
        "ForObjectDetection": {
            **linear("class_labels_classifier", "classes", "hidden"),
            **linear("bbox_predictor.layers.0", "hidden", "hidden"),
            **linear("bbox_predictor.layers.1", "hidden", "hidden"),
            **linear("bbox_predictor.layers.2", "coordinates", "hidden"),
        }
    },
    whole=("backbone", "input_projection", "position_embedding", "query_position_embeddings"),
    records_positions=True,
    config={
        "encoder_attention_heads": "encoder_heads",
        "decoder_attention_heads": "decoder_heads",
        "encoder_ffn_dim": "encoder_mlp",
        "decoder_ffn_dim": "decoder_mlp",
        "encoder_layers": "encoder_layers",
        "decoder_layers": "decoder_layers",
    },
    must_be_false=("auxiliary_loss",),
    # The attentions derive these from the config, which shows one head while a per-layer model is built.
    attributes={f"{path}.head_dim": d for path, (_, d) in ATTENTIONS.items()}
    | {f"{path}.scaling": f"{d} ** -0.5" for path, (_, d) in ATTENTIONS.items()},
    build_with={"encoder_attention_heads": 1, "decoder_attention_heads": 1},  # any width is a multiple of it
    # Recorded, since the queries of the decoder are fewer than the positions of the feature map that they read.
    attentions={path: f"{heads} {d}" for path, (heads, d) in ATTENTIONS.items()},
    tokens="one",  # so MACs are those of an image
    image="channels height width",
    # The stock class splits the width among the heads: fewer heads would be wider ones.
    must_equal=tuple((f"{heads} {d}", "hidden") for heads, d in ATTENTIONS.values()),
)
