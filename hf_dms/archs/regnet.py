"""RegNet: ResNet's stages, with blocks that are as wide inside as outside and a grouped convolution in the middle.

Read it next to transformers' `RegNetXLayer` and `RegNetYLayer`. A unit of the inner width is a whole group. In Y layers
a small network (squeeze and excitation) weighs the channels after the grouped convolution. Its inner width is a quarter
of the block's input width. That differs in the first block of a stage, which is never dropped. Each block reads the
residual stream without a norm over units, so masks are placed as in a ResNet.

The config has no image size: MACs are counted for 224 × 224 pixels, or for an `image_size` that was added to it. A
variant that keeps the resolution in the first stage is not supported: its stem may write into the stream of that stage.
"""

from __future__ import annotations

from typing import Any

from .resnet import normed_convolutions
from .spec import ArchSpec, Dim
from .vit import IMAGE


def _groups(config: Any, stage: int) -> int:
    return max(1, config.hidden_sizes[stage] // config.groups_width)


def _group_width(config: Any, stage: int) -> int:
    return config.hidden_sizes[stage] // _groups(config, stage)


def _first_squeeze(config: Any, stage: int) -> int:
    return round([config.embedding_size, *config.hidden_sizes][stage] / 4)  # a quarter of what the stage reads


INNER = "(groups{s} group_width{s})"
BLOCK = "encoder.stages.{s}.layers"
PARAMS, BUFFERS = normed_convolutions(
    {
        "embedder.embedder": "embedding channels three three",
        "encoder.stages.0.layers.0.shortcut": "hidden0 embedding one one",
        f"{BLOCK}.0.shortcut": "hidden{s} hidden{s-1} one one",
        "encoder.stages.0.layers.0.layer.0": "(groups0 group_width0) embedding one one",
        f"{BLOCK}.0.layer.0": f"{INNER} hidden{{s-1}} one one",
        f"{BLOCK}.{{i>0}}.layer.0": f"{INNER} hidden{{s}} one one",
        f"{BLOCK}.{{i}}.layer.1": f"{INNER} group_width{{s}} three three",
        f"{BLOCK}.{{i}}.layer.2": f"hidden{{s}} {INNER} one one",  # of an X layer
        f"{BLOCK}.{{i}}.layer.3": f"hidden{{s}} {INNER} one one",  # of a Y layer
    }
)


# With ReLUs only, as in a ResNet. Squeeze and excitation takes the mean of a unit over the image and gives the unit a
# factor: both commute with its mask.
SCALED = (  # not the one in front of the groups, whose convolution mixes no units
    "embedder.embedder.normalization",
    f"{BLOCK}.0.shortcut.normalization",
    *(f"{BLOCK}.{{i}}.layer.{number}.normalization" for number in (1, 2, 3)),
)


def _squeeze(layer: str, width: str) -> dict[str, str]:
    """The lines of the small network inside a Y layer."""
    path = f"{BLOCK}.{layer}.layer.2.attention"
    return {
        f"{path}.0.weight": f"{width} {INNER} one one",
        f"{path}.0.bias": width,
        f"{path}.2.weight": f"{INNER} {width} one one",
        f"{path}.2.bias": INNER,
    }


REGNET = ArchSpec(
    model_type="regnet",
    stages=lambda config: len(config.depths),
    layers={"layers{s}": BLOCK},
    dims=(
        Dim("groups{s}", _groups, scope="layer", stack="layers{s}"),
        Dim(
            "squeeze{s}", lambda config, stage: round(config.hidden_sizes[stage] / 4), scope="layer", stack="layers{s}"
        ),
        Dim("first{s}", _first_squeeze, scope="model"),
        Dim("hidden{s}", "hidden_sizes[{s}]", scope="model"),
        Dim("embedding", "embedding_size", scope="model"),
        Dim("layers{s}", "depths[{s}]", scope="depth"),
        Dim("group_width{s}", _group_width),
        Dim("quarter{s}", lambda config, stage: _group_width(config, stage) // 4),
        # The number in the config. If a stage is narrower than this number, `_groups` makes one group of the stage.
        Dim("widest_group", "groups_width"),
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("three", "3"),
        Dim("four", "4"),
        *IMAGE,
    ),
    params=PARAMS | _squeeze("0", "first{s}") | _squeeze("{i>0}", "squeeze{s}"),
    buffers=BUFFERS,
    heads={"ForImageClassification": {"classifier.1.weight": "label hidden{last}", "classifier.1.bias": "label"}},
    config={
        "embedding_size": "embedding",
        "hidden_sizes[{s}]": "hidden{s}",
        "depths[{s}]": "layers{s}",
        "groups_width": "widest_group",
    },
    # One group, whatever the width: a cut width need not be a multiple of the groups that the class would make.
    build_with={"groups_width": 10**9},
    variants={"hidden_act": {"relu": {"masked_batch_norms": SCALED}}},
    records_positions=True,
    must_be_true=("downsample_in_first_stage",),
    attributes={f"{BLOCK}.{{i}}.layer.1.convolution.groups": "groups{s}"},
    outputs={"last_hidden_state": "hidden{last} _ _", "pooler_output": "hidden{last} _ _"},
    tokens="one",
    image="channels height width",
    # The stock class derives all of these from the widths of the stages and of the stem.
    must_equal=(
        ("group_width{s} groups{s}", "hidden{s}"),
        ("quarter{s} groups{s}", "squeeze{s}"),
        ("quarter{s-1} groups{s-1}", "first{s}"),
        ("four first0", "embedding"),
    ),
)
