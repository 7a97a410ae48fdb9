"""EfficientNet: MobileNetV2's blocks with kernels of two sizes and a squeeze-and-excitation network inside each.

Read it beside `EfficientNetBlock`. As in a MobileNetV2 every block is a stage of its own and none is dropped: its
number decides its padding. A block that does not widen what it reads works on the stream itself.
"""

from __future__ import annotations

import math
from typing import Any

from .mobilenet_v2 import divisible
from .resnet import NORM
from .spec import ArchSpec, Dim
from .vit import IMAGE


def _blocks(config: Any) -> list[tuple[int, bool]]:
    """The entry of the config's lists that each block is made by, and whether it is the first one of it."""
    repeats = [math.ceil(config.depth_coefficient * repeats) for repeats in config.num_block_repeats]
    return [(entry, repeat == 0) for entry, count in enumerate(repeats) for repeat in range(count)]


def _rounded(config: Any, channels: int) -> int:
    return divisible(channels * config.width_coefficient, config.depth_divisor, config.depth_divisor)


def _read(config: Any, stage: int) -> int:
    entry, first = _blocks(config)[stage]
    # Blocks that repeat an entry of the lists read what the entry writes.
    return _rounded(config, config.in_channels[entry] if first else config.out_channels[entry])


def _width(config: Any, stage: int) -> int:
    return _rounded(config, config.out_channels[_blocks(config)[stage][0]])


def _mid(config: Any, stage: int) -> int:
    return _read(config, stage) * config.expand_ratios[_blocks(config)[stage][0]]


def _squeeze(config: Any, stage: int) -> int:
    # Of what the block reads, not of the wider units that the network squeezes: so does the stock class.
    return max(1, int(_read(config, stage) * config.squeeze_expansion_ratio))


def _kernel(config: Any, stage: int) -> int:
    return config.kernel_sizes[_blocks(config)[stage][0]]


BLOCK = "encoder.blocks.{s}"
# Convolutions have no biases of their own: a batch norm follows each, except inside squeeze-and-excitation.
KERNELS = {
    "embeddings.convolution": "stem channels three three",
    "encoder.blocks.0.expansion.expand_conv": "mid0 stem one one",
    f"{BLOCK}.expansion.expand_conv": "mid{s} hidden{s-1} one one",
    f"{BLOCK}.depthwise_conv.depthwise_conv": "mid{s} one kernel{s} kernel{s}",
    f"{BLOCK}.squeeze_excite.reduce": "squeeze{s} mid{s} one one",
    f"{BLOCK}.squeeze_excite.expand": "mid{s} squeeze{s} one one",
    f"{BLOCK}.projection.project_conv": "hidden{s} mid{s} one one",
    "encoder.top_conv": "top hidden{last} one one",
}
BIASES = {f"{BLOCK}.squeeze_excite.reduce.bias": "squeeze{s}", f"{BLOCK}.squeeze_excite.expand.bias": "mid{s}"}
NORMS = {
    "embeddings.batchnorm": "stem",
    f"{BLOCK}.expansion.expand_bn": "mid{s}",
    f"{BLOCK}.depthwise_conv.depthwise_norm": "mid{s}",
    f"{BLOCK}.projection.project_bn": "hidden{s}",
    "encoder.top_bn": "top",
}

EFFICIENTNET = ArchSpec(
    model_type="efficientnet",
    stages=lambda config: len(_blocks(config)),
    layers="encoder.blocks",
    dims=(
        # A residual stream runs through blocks of equal width. `same_as` makes one dim of those that are equal in size.
        # Block 0 has no block before it, so its dims have lines of their own.
        Dim("mid0", lambda config: _mid(config, 0), scope="model", same_as="stem"),
        Dim("mid{s}", _mid, scope="model", same_as="hidden{s-1}"),
        Dim("squeeze{s}", _squeeze, scope="model"),
        Dim("stem", lambda config: _rounded(config, 32), scope="model"),
        Dim("hidden0", lambda config: _width(config, 0), scope="model", same_as="stem"),
        Dim("hidden{s}", _width, scope="model", same_as="hidden{s-1}"),
        Dim("top", lambda config: _rounded(config, 1280), scope="model"),
        Dim("layers", lambda config: len(_blocks(config)), scope="depth"),
        Dim("kernel{s}", _kernel),
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("three", "3"),
        *IMAGE,
    ),
    params={f"{path}.weight": axes for path, axes in KERNELS.items()}
    | BIASES
    | {f"{path}.{name}": axes for path, axes in NORMS.items() for name in NORM[:2]},
    buffers={f"{path}.{name}": axes for path, axes in NORMS.items() for name in NORM[2:]}
    | {f"{path}.num_batches_tracked": "" for path in NORMS},
    heads={"ForImageClassification": {"classifier.weight": "label top", "classifier.bias": "label"}},
    # Widths follow from coefficients of the whole network: no stock config holds the width of one block.
    config={},
    per_layer_only=True,
    records_positions=True,
    # No `masked_batch_norms`: the activation is a Swish, which does not commute with a factor.
    attributes={f"{BLOCK}.depthwise_conv.depthwise_conv.groups": "mid{s}"},
    outputs={"last_hidden_state": "top _ _", "pooler_output": "top"},
    tokens="one",
    image="channels height width",
)
