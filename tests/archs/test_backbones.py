"""Backbones of detectors: networks in stages return the streams of their stages as feature maps.

Masks, cut and file agree on every map, and a detector finds their widths. A classifier that was cut can also be loaded
as a backbone.
"""

import pytest
import torch
import transformers
from helpers.encoders import dims_of, possible
from helpers.laws import DETECTOR, EXACT, SHIPPED, assert_same, batch_for, is_stock, same_tensors, searched, tiny
from helpers.tiny import relative_difference
from transformers import (
    AutoBackbone,
    AutoConfig,
    ConvNextBackbone,
    ConvNextForImageClassification,
    ConvNextV2Backbone,
    DetrConfig,
    DetrForObjectDetection,
    ResNetBackbone,
    ResNetForImageClassification,
    SwinForImageClassification,
)

from hf_dms import prune, save_pruned
from hf_dms.cut.prune import make_plan
from hf_dms.cut.verify import all_outputs_of, hard_masked
from hf_dms.gating.attach import gates_of

BACKBONES = (ResNetBackbone, ConvNextBackbone, ConvNextV2Backbone)
MAPS = ["stem", "stage1", "stage2", "stage3"]


def classifier_of(backbone):
    return getattr(transformers, backbone.__name__.replace("Backbone", "ForImageClassification"))


def kept_of(name, kept, backbone):
    """Units of a feature map that stay: those of its stage's stream, or of the stem's; None for all."""
    stem = "embedding" if backbone is ResNetBackbone else "hidden0"
    return kept.get(stem if name == "stem" else f"hidden{int(name[-1]) - 1}", [None])[0]


def backbone_in(folder, **options):
    """What the Auto class would load; `AutoBackbone.from_pretrained` itself takes ids on the Hub only."""
    cls = type(AutoBackbone.from_config(AutoConfig.from_pretrained(folder)))
    return cls.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("layout", ["uniform", "per_layer", "padded"])
@pytest.mark.parametrize("several", [True, False], ids=["all dims", "without widths of stages"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_masked_equals_cut_equals_reloaded(backbone, several, layout, tmp_path):
    dims = dims_of(classifier_of(backbone))
    dims = dims if several else tuple(dim for dim in dims if dim != "hidden")
    if not possible(classifier_of(backbone), dims, layout):
        dims = ("layers",)
    model = tiny(backbone, dtype=torch.float64, out_indices=(0, 1, 2, 3))
    _, sizes = searched(model, prune=dims, layout=layout)
    inputs = batch_for(model)
    pruned = prune(model, inputs=inputs)
    with hard_masked(model, sizes):
        masked = all_outputs_of(model, inputs)
    kept = make_plan(gates_of(model), sizes).kept
    assert [*masked] == [f"feature_maps.{name}" for name in MAPS]
    for name in MAPS:
        if (units := kept_of(name, kept, backbone)) is not None:
            masked[f"feature_maps.{name}"] = masked[f"feature_maps.{name}"].index_select(1, units)
    save_pruned(pruned, tmp_path / "out", inputs=inputs)
    reloaded = backbone_in(tmp_path / "out", dtype=torch.float64)
    assert type(reloaded) is type(pruned)
    assert reloaded.out_features == MAPS
    assert same_tensors(reloaded, pruned)
    found = all_outputs_of(reloaded, inputs)
    assert_same(masked, all_outputs_of(pruned, inputs), found, EXACT)
    assert reloaded.channels == [each.shape[1] for each in found.values()]  # what a detector's neck is built from
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


@pytest.mark.parametrize("classifier", [ResNetForImageClassification, ConvNextForImageClassification])
def test_a_cut_classifier_is_loaded_as_a_backbone(classifier, tmp_path):
    model = tiny(classifier)
    searched(model, prune=dims_of(classifier), layout="per_layer")
    inputs = batch_for(model)
    pruned = prune(model, inputs=inputs)
    save_pruned(pruned, tmp_path / "out", inputs=inputs)
    backbone = backbone_in(tmp_path / "out", out_features=["stage2", "stage3"])
    assert type(backbone).__name__ == f"Dms{classifier.__name__.replace('ForImageClassification', 'Backbone')}"
    with torch.no_grad():
        states = pruned.base_model(**inputs, output_hidden_states=True).hidden_states
        maps = backbone(**inputs).feature_maps
    assert backbone.channels == [each.shape[1] for each in maps]
    if classifier is ResNetForImageClassification:  # a ConvNeXt's backbone has norms of its own behind the stages
        assert all(relative_difference(mine, theirs) < SHIPPED for mine, theirs in zip(maps, states[-2:], strict=True))


def test_a_detector_is_built_on_a_cut_backbone(tmp_path):
    model = tiny(ResNetBackbone)
    searched(model, prune=("mid", "hidden"), layout="per_layer")
    save_pruned(prune(model), tmp_path / "out")
    backbone = backbone_in(tmp_path / "out")
    sizes = {name: value for name, value in DETECTOR.items() if name != "backbone_config"}
    detector = DetrForObjectDetection(DetrConfig(**sizes, backbone_config=backbone.config)).eval()
    inner = detector.model.backbone.model
    assert type(inner) is type(backbone)
    assert detector.model.input_projection.in_channels == backbone.channels[-1]
    inner.load_state_dict(backbone.state_dict())
    pixels = torch.randn(1, 2, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = [each(pixels).feature_maps[-1] for each in (inner, backbone)]  # of frozen norms, and of batch norms
        assert relative_difference(*maps) < SHIPPED
        assert detector(pixels).logits.isfinite().all()


def test_a_network_whose_config_does_not_hold_the_widths_is_no_backbone(tmp_path):
    model = tiny(SwinForImageClassification)
    searched(model, prune=("heads", "mlp"), layout="per_layer")
    save_pruned(prune(model), tmp_path / "out")
    with pytest.raises(ValueError, match=r"'dms_swin' cannot be loaded as a backbone: .* Use AutoModel"):
        backbone_in(tmp_path / "out")
