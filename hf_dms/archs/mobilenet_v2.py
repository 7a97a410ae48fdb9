"""MobileNetV2: inverted residual blocks, wide inside and narrow outside, with depthwise convolutions.

Read it beside `MobileNetV2InvertedResidual`. Every block is a stage of its own: it writes a residual stream, which is
that of the block before it where the two are equally wide. The padding of `tf_padding` depends on kernels, strides and
the image alone. No block is dropped: their number, and each one's stride, are in the code of the stock class. So are
the widths, times the config's `depth_multiplier`.
"""

from __future__ import annotations

from typing import Any

from .resnet import normed_convolutions
from .spec import ArchSpec, Dim
from .vit import IMAGE

FIRST = 16  # what the stem writes, before `depth_multiplier`
WIDTHS = (24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)  # what each block writes
TOP = 1280


def divisible(width: float, divisor: int, smallest: int) -> int:
    """The nearest multiple of a divisor, at least `smallest`, and at most a tenth below the width."""
    rounded = max(smallest, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def _times(config: Any, channels: int, factor: float) -> int:
    return divisible(round(channels * factor), config.depth_divisible_by, config.min_depth)


def _width(config: Any, stage: int) -> int:
    return _times(config, WIDTHS[stage], config.depth_multiplier)


def _mid(config: Any, stage: int) -> int:
    # Rounded twice, as in the stock class, which widens the rounded width that a block reads.
    before = _times(config, (FIRST, *WIDTHS)[stage], config.depth_multiplier)
    return _times(config, before, config.expand_ratio)


def _top(config: Any) -> int:
    # Networks narrower than the original one may keep its full width at the end.
    finegrained = config.finegrained_output and config.depth_multiplier < 1
    return TOP if finegrained else _times(config, TOP, config.depth_multiplier)


PARAMS, BUFFERS = normed_convolutions(
    {
        "conv_stem.first_conv": "stem channels three three",
        "conv_stem.conv_3x3": "stem one three three",  # depthwise: one input channel per kernel
        "conv_stem.reduce_1x1": "first stem one one",
        "layer.0.expand_1x1": "mid0 first one one",
        "layer.{s}.expand_1x1": "mid{s} hidden{s-1} one one",
        "layer.{s}.conv_3x3": "mid{s} one three three",
        "layer.{s}.reduce_1x1": "hidden{s} mid{s} one one",
        "conv_1x1": "top hidden{last} one one",
    }
)

MOBILENET_V2 = ArchSpec(
    model_type="mobilenet_v2",
    stages=lambda config: len(WIDTHS),
    layers="layer",
    dims=(
        Dim("mid{s}", _mid, scope="model"),
        Dim("stem", lambda config: _times(config, 32, config.depth_multiplier), scope="model"),
        Dim("first", lambda config: _times(config, FIRST, config.depth_multiplier), scope="model"),
        # A block with a stride of 2 adds nothing to a stream. If it keeps the width, the two are one dim all the same:
        # that is right as well, with fewer choices.
        Dim("hidden0", lambda config: _width(config, 0), scope="model", same_as="first"),
        Dim("hidden{s}", _width, scope="model", same_as="hidden{s-1}"),
        Dim("top", _top, scope="model"),
        Dim("layers", str(len(WIDTHS)), scope="depth"),
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("three", "3"),
        *IMAGE,
    ),
    params=PARAMS,
    buffers=BUFFERS,
    heads={"ForImageClassification": {"classifier.weight": "label top", "classifier.bias": "label"}},
    # The widths are in the code of the stock class, times one number of the config.
    config={},
    per_layer_only=True,
    # No `masked_batch_norms`: a ReLU6 stops at 6, so it does not commute with a factor.
    records_positions=True,
    must_be_true=("first_layer_is_expansion",),  # else the stem has one more convolution
    attributes={
        # A depthwise convolution checks its groups against its channels when it runs.
        "conv_stem.conv_3x3.convolution.groups": "stem",
        "layer.{s}.conv_3x3.convolution.groups": "mid{s}",
    },
    outputs={"last_hidden_state": "top _ _", "pooler_output": "top"},
    tokens="one",
    image="channels height width",
)
