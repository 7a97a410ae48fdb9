"""MobileViT: MobileNetV2's blocks, and blocks in which a small transformer looks at the whole image.

Read it beside `MobileViTLayer`. Each stage {s} is one such layer. A convolution reads what the layer got and what its
transformer made of it, one after the other: `"fused{s} (reduced{s} + projected{s}) kernel kernel"`. Nothing is added to
what the convolutions of a stage write, so each of them has a width of its own.

The layers of a stage's transformer are a stack. Their number is in the code of the stock class, and the config has one
factor for all expanded widths and one for all MLPs. So a cut model has the per-layer format.
"""

from __future__ import annotations

import functools
from typing import Any

from .mobilenet_v2 import divisible
from .resnet import normed_convolutions
from .spec import ArchSpec, Dim
from .vit import IMAGE

DEPTHS = (2, 4, 3)  # layers of each stage's transformer


def _expanded(config: Any, read: int) -> int:
    return divisible(round(read * config.expand_ratio), 8, 8)


def _mid(block: int, config: Any) -> int:
    return _expanded(config, config.neck_hidden_sizes[min(block, 2)])


def _neck(config: Any, stage: int) -> int:
    return config.neck_hidden_sizes[stage + 3]


STAGE = "encoder.layer.{s+2}"
LAYER = f"{STAGE}.transformer.layer.{{i}}"
BLOCKS = ("encoder.layer.0.layer.0", *(f"encoder.layer.1.layer.{block}" for block in range(3)))  # before all stages
STREAMS = ("stem", "first", "second", "second", "second")  # between these blocks
PARAMS, BUFFERS = normed_convolutions(
    {
        "conv_stem": "stem channels three three",
        **{
            f"{path}.{convolution}": axes
            for block, (path, before, after) in enumerate(zip(BLOCKS, STREAMS, STREAMS[1:]))
            for convolution, axes in {
                "expand_1x1": f"mid{block} {before} one one",
                "conv_3x3": f"mid{block} one three three",
                "reduce_1x1": f"{after} mid{block} one one",
            }.items()
        },
        "encoder.layer.2.downsampling_layer.expand_1x1": "expanded0 second one one",
        f"{STAGE}.downsampling_layer.expand_1x1": "expanded{s} fused{s-1} one one",
        f"{STAGE}.downsampling_layer.conv_3x3": "expanded{s} one three three",
        f"{STAGE}.downsampling_layer.reduce_1x1": "reduced{s} expanded{s} one one",
        f"{STAGE}.conv_kxk": "local{s} reduced{s} kernel kernel",
        f"{STAGE}.conv_projection": "projected{s} hidden{s} one one",
        f"{STAGE}.fusion": "fused{s} (reduced{s} + projected{s}) kernel kernel",
        "conv_1x1_exp": "top fused{last} one one",
    }
)
TRANSFORMER = {
    f"{STAGE}.conv_1x1.convolution.weight": "hidden{s} local{s} one one",  # without a norm behind it
    f"{LAYER}.layernorm_before.weight": "hidden{s}",
    f"{LAYER}.layernorm_before.bias": "hidden{s}",
    f"{LAYER}.attention.attention.query.weight": "(heads{s} d{s}) hidden{s}",
    f"{LAYER}.attention.attention.query.bias": "(heads{s} d{s})",
    f"{LAYER}.attention.attention.key.weight": "(heads{s} d{s}) hidden{s}",
    f"{LAYER}.attention.attention.key.bias": "(heads{s} d{s})",
    f"{LAYER}.attention.attention.value.weight": "(heads{s} d{s}) hidden{s}",
    f"{LAYER}.attention.attention.value.bias": "(heads{s} d{s})",
    f"{LAYER}.attention.output.dense.weight": "hidden{s} (heads{s} d{s})",
    f"{LAYER}.attention.output.dense.bias": "hidden{s}",
    f"{LAYER}.layernorm_after.weight": "hidden{s}",
    f"{LAYER}.layernorm_after.bias": "hidden{s}",
    f"{LAYER}.intermediate.dense.weight": "mlp{s} hidden{s}",
    f"{LAYER}.intermediate.dense.bias": "mlp{s}",
    f"{LAYER}.output.dense.weight": "hidden{s} mlp{s}",
    f"{LAYER}.output.dense.bias": "hidden{s}",
    f"{STAGE}.layernorm.weight": "hidden{s}",
    f"{STAGE}.layernorm.bias": "hidden{s}",
}

MOBILEVIT = ArchSpec(
    model_type="mobilevit",
    stages=lambda config: len(DEPTHS),
    layers={"layers{s}": f"{STAGE}.transformer.layer"},
    dims=(
        Dim("heads{s}", "num_attention_heads", scope="layer", stack="layers{s}"),
        Dim(
            "mlp{s}",
            lambda config, stage: int(config.hidden_sizes[stage] * config.mlp_ratio),
            scope="layer",
            stack="layers{s}",
        ),
        Dim("hidden{s}", "hidden_sizes[{s}]", scope="model"),
        # A stream runs through blocks of equal width, where the first one of a stage does not shrink the image.
        Dim("reduced0", "neck_hidden_sizes[3]", scope="model"),
        Dim("reduced{s}", _neck, scope="model", same_as="fused{s-1}"),
        Dim("local{s}", _neck, scope="model"),
        Dim("projected{s}", _neck, scope="model"),
        Dim("fused{s}", _neck, scope="model"),
        Dim("expanded{s}", lambda config, stage: _expanded(config, _neck(config, stage - 1)), scope="model"),
        *(Dim(f"mid{block}", functools.partial(_mid, block), scope="model") for block in range(len(BLOCKS))),
        Dim("stem", "neck_hidden_sizes[0]", scope="model"),
        Dim("first", "neck_hidden_sizes[1]", scope="model", same_as="stem"),
        Dim("second", "neck_hidden_sizes[2]", scope="model"),
        Dim("top", "neck_hidden_sizes[6]", scope="model"),
        Dim("layers{s}", lambda config, stage: DEPTHS[stage], scope="depth"),
        Dim("d{s}", lambda config, stage: config.hidden_sizes[stage] // config.num_attention_heads),
        Dim("kernel", "conv_kernel_size"),
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("three", "3"),
        *IMAGE,
    ),
    params=PARAMS | TRANSFORMER,
    buffers=BUFFERS,
    families={"mid": tuple(f"mid{block}" for block in range(len(BLOCKS)))},
    heads={"ForImageClassification": {"classifier.weight": "label top", "classifier.bias": "label"}},
    config={},
    per_layer_only=True,
    records_positions=True,
    attentions={f"{LAYER}.attention.attention": "heads{s} d{s}"},
    attributes={
        # A depthwise convolution checks its groups against its channels when it runs.
        **{f"{path}.conv_3x3.convolution.groups": f"mid{block}" for block, path in enumerate(BLOCKS)},
        f"{STAGE}.downsampling_layer.conv_3x3.convolution.groups": "expanded{s}",
        f"{LAYER}.attention.attention.num_attention_heads": "heads{s}",
        f"{LAYER}.attention.attention.all_head_size": "heads{s} d{s}",
    },
    outputs={"last_hidden_state": "top _ _", "pooler_output": "top"},
    tokens="one",
    image="channels height width",
)
