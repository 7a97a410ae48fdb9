"""Swin: a vision transformer in stages, with attention inside windows of an image.

Read it next to transformers' `SwinLayer` and `SwinPatchMerging`. Every second block of a stage shifts its windows. The
stock class decides by the number of a block, so a block whose number changes keeps its shift (`by_number`). Each block
has a table of position biases with a column for each head, as BEiT has. Between two stages a norm and a linear map read
four neighbouring patches side by side. They are not a block, so no cut drops them.

The stock config has one width for all stages, which doubles from stage to stage, and one ratio for all MLPs. So a cut
model has the per-layer format.
"""

from __future__ import annotations

from typing import Any

from .spec import ArchSpec, Dim
from .vit import IMAGE, PATCH, num_patches


def _width(config: Any, stage: int) -> int:
    return config.embed_dim * 2**stage


BLOCK = "encoder.layers.{s}.blocks.{i}"
MERGING = "encoder.layers.{s-1}.downsample"  # the stock class keeps it in the stage that it reads

SWIN = ArchSpec(
    model_type="swin",
    stages=lambda config: len(config.depths),
    layers={"layers{s}": "encoder.layers.{s}.blocks"},
    dims=(
        Dim("heads{s}", "num_heads[{s}]", scope="layer", stack="layers{s}"),
        Dim(
            "mlp{s}",
            lambda config, stage: int(config.mlp_ratio * _width(config, stage)),  # the ratio can be a fraction
            scope="layer",
            stack="layers{s}",
        ),
        Dim("hidden{s}", _width, scope="model"),
        Dim("layers{s}", "depths[{s}]", scope="depth"),
        Dim("d{s}", lambda config, stage: _width(config, stage) // config.num_heads[stage]),
        # All pairs of places in a window: their distances along each side.
        Dim("distances", lambda config: (2 * config.window_size - 1) ** 2),
        Dim("patches", num_patches),
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("four", "4"),
        *IMAGE,
        *PATCH,
    ),
    params={
        "embeddings.patch_embeddings.projection.weight": "hidden0 channels patch_height patch_width",
        "embeddings.patch_embeddings.projection.bias": "hidden0",
        "embeddings.position_embeddings": "one patches hidden0",  # only with `use_absolute_embeddings`
        "embeddings.norm.weight": "hidden0",
        "embeddings.norm.bias": "hidden0",
        f"{BLOCK}.layernorm_before.weight": "hidden{s}",
        f"{BLOCK}.layernorm_before.bias": "hidden{s}",
        f"{BLOCK}.attention.q_proj.weight": "(heads{s} d{s}) hidden{s}",
        f"{BLOCK}.attention.q_proj.bias": "(heads{s} d{s})",
        f"{BLOCK}.attention.k_proj.weight": "(heads{s} d{s}) hidden{s}",
        f"{BLOCK}.attention.k_proj.bias": "(heads{s} d{s})",
        f"{BLOCK}.attention.v_proj.weight": "(heads{s} d{s}) hidden{s}",
        f"{BLOCK}.attention.v_proj.bias": "(heads{s} d{s})",
        f"{BLOCK}.attention.o_proj.weight": "hidden{s} (heads{s} d{s})",
        f"{BLOCK}.attention.o_proj.bias": "hidden{s}",
        f"{BLOCK}.attention.relative_position_bias.relative_position_bias_table": "distances heads{s}",
        f"{BLOCK}.layernorm_after.weight": "hidden{s}",
        f"{BLOCK}.layernorm_after.bias": "hidden{s}",
        f"{BLOCK}.mlp.fc1.weight": "mlp{s} hidden{s}",
        f"{BLOCK}.mlp.fc1.bias": "mlp{s}",
        f"{BLOCK}.mlp.fc2.weight": "hidden{s} mlp{s}",
        f"{BLOCK}.mlp.fc2.bias": "hidden{s}",
        # Four patches side by side: a unit of the stage before has four entries here.
        f"{MERGING}.norm.weight": "(four hidden{s-1})",
        f"{MERGING}.norm.bias": "(four hidden{s-1})",
        f"{MERGING}.reduction.weight": "hidden{s} (four hidden{s-1})",
        "layernorm.weight": "hidden{last}",
        "layernorm.bias": "hidden{last}",
    },
    heads={"ForImageClassification": {"classifier.weight": "label hidden{last}", "classifier.bias": "label"}},
    config={"depths[{s}]": "layers{s}"},
    # The stock config has no width for a single stage, and no width of an MLP.
    per_layer_only=True,
    by_number={f"{BLOCK}.shift_size": lambda config, number: number % 2 * (config.window_size // 2)},
    # head_dim and scaling stay as they are: the class is built with its dense widths and heads.
    attributes={f"{BLOCK}.attention.num_attention_heads": "heads{s}"},
    records_positions=True,
    attentions={f"{BLOCK}.attention": "heads{s} d{s}"},  # recorded, since windows can be padded and stages differ
    outputs={"last_hidden_state": "hidden{last}", "pooler_output": "hidden{last}"},
    tokens="one",
    image="channels height width",
)
