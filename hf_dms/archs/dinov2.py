"""DINOv2: ViT with a scale on each block's output and a head that reads the class token and the mean of the patches.

The config gives the MLP's width as a whole multiple of the hidden size. Read it next to `Dinov2Layer` of transformers
5.23. That of 5.17 has other names and no separate head size, and does not bind.
"""

from dataclasses import replace

from .spec import Dim, with_dims
from .vit import VIT

DINOV2 = replace(
    VIT,
    model_type="dinov2",
    layers="encoder.layer",
    dims=with_dims(
        tuple(dim for dim in VIT.dims if dim.name != "pool"),
        Dim("mlp", lambda config: config.hidden_size * config.mlp_ratio, scope="layer"),
        Dim("two", "2"),
    ),
    params={
        "embeddings.cls_token": "one one hidden",
        "embeddings.mask_token": "one hidden",
        "embeddings.position_embeddings": "one tokens hidden",
        "embeddings.patch_embeddings.projection.weight": "hidden channels patch_height patch_width @ patches",
        "embeddings.patch_embeddings.projection.bias": "hidden",
        "encoder.layer.{i}.norm1.weight": "hidden",
        "encoder.layer.{i}.norm1.bias": "hidden",
        "encoder.layer.{i}.attention.q_proj.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.q_proj.bias": "(heads d)",
        "encoder.layer.{i}.attention.k_proj.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.k_proj.bias": "(heads d)",
        "encoder.layer.{i}.attention.v_proj.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.v_proj.bias": "(heads d)",
        "encoder.layer.{i}.attention.o_proj.weight": "hidden (heads d)",
        "encoder.layer.{i}.attention.o_proj.bias": "hidden",
        "encoder.layer.{i}.layer_scale1.lambda1": "hidden",
        "encoder.layer.{i}.norm2.weight": "hidden",
        "encoder.layer.{i}.norm2.bias": "hidden",
        "encoder.layer.{i}.mlp.fc1.weight": "mlp hidden",
        "encoder.layer.{i}.mlp.fc1.bias": "mlp",
        "encoder.layer.{i}.mlp.fc2.weight": "hidden mlp",
        "encoder.layer.{i}.mlp.fc2.bias": "hidden",
        "encoder.layer.{i}.layer_scale2.lambda1": "hidden",
        "layernorm.weight": "hidden",
        "layernorm.bias": "hidden",
    },
    heads={"ForImageClassification": {"classifier.weight": "label (two hidden) @ 1", "classifier.bias": "label"}},
    # Dinov2Config has no intermediate_size. The one that `config` (ViT's) adds is there to form the ratio, and to tell
    # per-layer models their widths.
    config_ratios={"mlp_ratio": ("intermediate_size", "hidden_size")},
    # Names of layers, for backbones. The stock class derives them from the number of layers, which a cut changes.
    config_leaves_out=("stage_names", "out_features", "out_indices"),
    # The largest model only, whose MLP is gated, with other names.
    must_be_false=("use_swiglu_ffn",),
    attributes={"encoder.layer.{i}.attention.num_attention_heads": "heads"},
    # Any ratio will do: the per-layer class resizes each layer after it is built.
    build_with={"mlp_ratio": 1},
    outputs={},  # without a pooler's map, `pooler_output` is the class token as it is
    # The config holds their ratio, which must be whole.
    must_divide=(("hidden", "mlp"),),
)
