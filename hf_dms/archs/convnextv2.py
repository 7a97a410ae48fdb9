"""ConvNeXt V2: ConvNeXt with a global response normalisation inside the MLP in place of the scale on its output."""

from dataclasses import replace

from .convnext import CONVNEXT

CONVNEXTV2 = replace(
    CONVNEXT,
    model_type="convnextv2",
    # The stock class keeps these weights in the shape in which they are broadcast over [batch, height, width, units].
    params={name: axes for name, axes in CONVNEXT.params.items() if not name.endswith("layer_scale_parameter")}
    | {
        "encoder.stages.{s}.layers.{i}.grn.weight": "one one one mlp{s}",
        "encoder.stages.{s}.layers.{i}.grn.bias": "one one one mlp{s}",
    },
    # It divides by a mean over the units, so a unit that is 0 would still count. Gates replace that mean.
    response_norms=("encoder.stages.{s}.layers.{i}.grn",),
)
