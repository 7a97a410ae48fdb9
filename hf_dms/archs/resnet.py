"""ResNet: stages of residual blocks, with batch norms after the convolutions and a ReLU after each sum.

Read it next to transformers' `ResNetBottleNeckLayer` and `ResNetBasicLayer`. The first block of a stage reads the width
of the stage before it, so it is never dropped. Each block reads the residual stream without a norm over units. So masks
are on the batch norms in front of the ReLUs, or, where that would be another function, on the inputs of the
convolutions. If the stem has the width of the first stage (ResNet-18), the two are pruned together. Otherwise the stem
is not pruned, because the stock class drops a shortcut when the two become equal.

The config has no image size: MACs are counted for 224 × 224 pixels, or for an `image_size` that was added to it.
"""

from __future__ import annotations

import re

from .spec import ArchSpec, Dim
from .vit import IMAGE

# Two parameters and two running statistics: all have one entry per channel, and a cut slices all four.
NORM = ("weight", "bias", "running_mean", "running_var")


def normed_convolutions(convolutions: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Lines for the parameters and buffers of convolutions and their batch norms.

    Args:
        convolutions: path of the module that holds both → axes of the convolution's weight.
    """
    params: dict[str, str] = {}
    buffers: dict[str, str] = {}
    for path, axes in convolutions.items():
        # The first axis of a kernel: the channels that it writes, which the norm behind it scales.
        units = re.findall(r"\([^)]*\)|\S+", axes)[0]
        params[f"{path}.convolution.weight"] = axes
        params |= {f"{path}.normalization.{name}": units for name in NORM[:2]}
        buffers |= {f"{path}.normalization.{name}": units for name in NORM[2:]}
        # One number for all channels: it has no axis.
        buffers[f"{path}.normalization.num_batches_tracked"] = ""
    return params, buffers


# What is not repeated in every block. A shortcut belongs to the first block of a stage, which no cut drops.
OUTSIDE = {
    "embedder.embedder": "embedding channels seven seven",
    "encoder.stages.0.layers.0.shortcut": "hidden0 embedding one one",
    "encoder.stages.{s}.layers.0.shortcut": "hidden{s} hidden{s-1} one one",
}
BOTTLENECK = normed_convolutions(
    OUTSIDE
    | {
        "encoder.stages.0.layers.0.layer.0": "reduced0 embedding one one",
        "encoder.stages.{s}.layers.0.layer.0": "reduced{s} hidden{s-1} one one",
        "encoder.stages.{s}.layers.{i>0}.layer.0": "reduced{s} hidden{s} one one",
        "encoder.stages.{s}.layers.{i}.layer.1": "mid{s} reduced{s} three three",
        "encoder.stages.{s}.layers.{i}.layer.2": "hidden{s} mid{s} one one",
    }
)
BASIC = normed_convolutions(
    OUTSIDE
    | {
        "encoder.stages.0.layers.0.layer.0": "mid0 embedding three three",
        "encoder.stages.{s}.layers.0.layer.0": "mid{s} hidden{s-1} three three",
        "encoder.stages.{s}.layers.{i>0}.layer.0": "mid{s} hidden{s} three three",
        "encoder.stages.{s}.layers.{i}.layer.1": "hidden{s} mid{s} three three",
    }
)
# With a ReLU behind it, a channel that its batch norm sets to 0 stays 0, as if it had been cut. Other activations may
# map 0 to something else. Then masks are on the inputs of the convolutions, as in any architecture.
SCALED = (
    "embedder.embedder.normalization",
    "encoder.stages.{s}.layers.0.shortcut.normalization",
    *(f"encoder.stages.{{s}}.layers.{{i}}.layer.{number}.normalization" for number in (0, 1, 2)),
)
FIXED = (
    Dim("hidden{s}", "hidden_sizes[{s}]", scope="model"),
    Dim("layers{s}", "depths[{s}]", scope="depth"),
    Dim("embedding", "embedding_size", same_as="hidden0"),
    Dim("label", "num_labels"),
    Dim("one", "1"),
    Dim("three", "3"),
    Dim("four", "4"),
    Dim("seven", "7"),
    *IMAGE,
)

RESNET = ArchSpec(
    model_type="resnet",
    stages=lambda config: len(config.depths),
    layers={"layers{s}": "encoder.stages.{s}.layers"},
    dims=(
        # A bottleneck is narrow between its first and its last convolution: what the first writes, and the second.
        Dim("reduced{s}", "hidden_sizes[{s}] // 4", scope="layer", stack="layers{s}"),
        Dim("mid{s}", "hidden_sizes[{s}] // 4", scope="layer", stack="layers{s}"),
        *FIXED,
    ),
    params=BOTTLENECK[0],
    buffers=BOTTLENECK[1],
    # Number 0 of the classifier flattens its input, and has no parameters.
    heads={
        "ForImageClassification": {"classifier.1.weight": "label hidden{last}", "classifier.1.bias": "label"},
        "Backbone": {},  # no further lines, but without an entry here binding refuses backbones
    },
    config={"embedding_size": "embedding", "hidden_sizes[{s}]": "hidden{s}", "depths[{s}]": "layers{s}"},
    # The two change different fields, so both can apply to one model.
    variants={
        "hidden_act": {"relu": {"masked_batch_norms": SCALED}},
        "layer_type": {
            "basic": {
                "dims": (Dim("mid{s}", "hidden_sizes[{s}]", scope="layer", stack="layers{s}"), *FIXED),
                "params": BASIC[0],
                "buffers": BASIC[1],
                "must_equal": (("mid{s}", "hidden{s}"),),
            }
        },
    },
    records_positions=True,
    outputs={
        "last_hidden_state": "hidden{last} _ _",
        "pooler_output": "hidden{last} _ _",
        "feature_maps.stem": "embedding _ _",
        "feature_maps.stage{s+1}": "hidden{s} _ _",
    },
    tokens="one",  # MACs per image
    image="channels height width",
    # The stock config has one size per stage, from which the class derives those inside its blocks.
    must_equal=(("reduced{s}", "mid{s}"), ("four reduced{s}", "hidden{s}")),
    # The stock class gives the first block a shortcut only if its width changes there.
    must_differ=(("embedding", "hidden0"),),
)
