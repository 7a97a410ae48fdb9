"""ConvNeXt: stages of depthwise convolution, layer norm and a plain MLP four times as wide, with a scale on its output.

Read it next to transformers' `ConvNextLayer`. Each stage has its own residual width and depth. Between two stages a
norm and a strided convolution read the width of the stage before. They are not a layer, so no cut drops them. The stock
config has no attribute for the MLP's width.
"""

from __future__ import annotations

from .spec import ArchSpec, Dim
from .vit import IMAGE, PATCH

CONVNEXT = ArchSpec(
    model_type="convnext",
    stages="num_stages",
    layers={"layers{s}": "encoder.stages.{s}.layers"},
    dims=(
        Dim("mlp{s}", "4 * hidden_sizes[{s}]", scope="layer", stack="layers{s}"),
        Dim("hidden{s}", "hidden_sizes[{s}]", scope="model"),
        Dim("layers{s}", "depths[{s}]", scope="depth"),
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("two", "2"),
        Dim("four", "4"),
        Dim("kernel", "7"),  # written in the code of the stock class, as are the four and the two
        *IMAGE,
        *PATCH,
    ),
    params={
        "embeddings.patch_embeddings.weight": "hidden0 channels patch_height patch_width",
        "embeddings.patch_embeddings.bias": "hidden0",
        "embeddings.layernorm.weight": "hidden0",
        "embeddings.layernorm.bias": "hidden0",
        # Between two stages, so not in a layer: the first stage has none.
        "encoder.stages.{s}.downsampling_layer.0.weight": "hidden{s-1}",
        "encoder.stages.{s}.downsampling_layer.0.bias": "hidden{s-1}",
        "encoder.stages.{s}.downsampling_layer.1.weight": "hidden{s} hidden{s-1} two two",
        "encoder.stages.{s}.downsampling_layer.1.bias": "hidden{s}",
        # Depthwise: one input channel per kernel. The number of groups follows the width. It reads the stream without a
        # norm, which does no harm: it mixes no units, and the norm behind it is masked.
        "encoder.stages.{s}.layers.{i}.dwconv.weight": "hidden{s} one kernel kernel",
        "encoder.stages.{s}.layers.{i}.dwconv.bias": "hidden{s}",
        "encoder.stages.{s}.layers.{i}.layernorm.weight": "hidden{s}",
        "encoder.stages.{s}.layers.{i}.layernorm.bias": "hidden{s}",
        "encoder.stages.{s}.layers.{i}.pwconv1.weight": "mlp{s} hidden{s}",
        "encoder.stages.{s}.layers.{i}.pwconv1.bias": "mlp{s}",
        "encoder.stages.{s}.layers.{i}.pwconv2.weight": "hidden{s} mlp{s}",
        "encoder.stages.{s}.layers.{i}.pwconv2.bias": "hidden{s}",
        "encoder.stages.{s}.layers.{i}.layer_scale_parameter": "hidden{s}",
        "layernorm.weight": "hidden{last}",
        "layernorm.bias": "hidden{last}",
        # Of a backbone, which has no norm at its end: one for each feature map.
        "hidden_states_norms.stem.weight": "hidden0",
        "hidden_states_norms.stem.bias": "hidden0",
        "hidden_states_norms.stage{s+1}.weight": "hidden{s}",
        "hidden_states_norms.stage{s+1}.bias": "hidden{s}",
    },
    heads={
        "ForImageClassification": {"classifier.weight": "label hidden{last}", "classifier.bias": "label"},
        "Backbone": {},  # no further lines, but without an entry here binding refuses backbones
    },
    # The widths of MLPs are not in it, see `must_equal`.
    config={"hidden_sizes[{s}]": "hidden{s}", "depths[{s}]": "layers{s}"},
    records_positions=True,
    # These norms see [batch, channels, height, width], where the others see the channels last.
    channels_first=(
        "embeddings.layernorm",
        "encoder.stages.{s}.downsampling_layer.0",
        "hidden_states_norms.stem",
        "hidden_states_norms.stage{s+1}",
    ),
    outputs={
        "last_hidden_state": "hidden{last} _ _",
        "pooler_output": "hidden{last}",
        "feature_maps.stem": "hidden0 _ _",
        "feature_maps.stage{s+1}": "hidden{s} _ _",
    },
    tokens="one",  # so MACs are those of an image: stages have different numbers of positions
    image="channels height width",
    # The stock class multiplies by four, so with a stock layout the two are only pruned together.
    must_equal=(("four hidden{s}", "mlp{s}"),),
)
