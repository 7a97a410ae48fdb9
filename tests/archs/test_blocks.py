"""MobileNetV2 and EfficientNet: every block a stage of its own, and stock configs that do not hold their widths."""

import pytest
import torch
from helpers.laws import batch_for, is_stock, searched, tiny
from helpers.refit import bound_of, cut_by
from helpers.tiny import untouched
from transformers import (
    AutoModelForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
    MobileViTForImageClassification,
    SwinForImageClassification,
)

from hf_dms import DMSConfig, attach_, prune, repair_
from hf_dms.archs.bind import sized
from hf_dms.archs.efficientnet import EFFICIENTNET
from hf_dms.archs.enlarge import enlarged_config
from hf_dms.archs.mobilenet_v2 import MOBILENET_V2
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.plan import Plan
from hf_dms.refit.repairable import check_repairable

CLASSES = (MobileNetV2ForImageClassification, EfficientNetForImageClassification)
ONLY_PER_LAYER = (*CLASSES, SwinForImageClassification, MobileViTForImageClassification)


def streams(spec, config):
    spec, sizes = sized(spec, config)
    names = [name for name in spec.prunable if name.startswith(("stem", "first", "hidden", "top"))]
    return {name: sizes[name] for name in names}


def test_blocks_that_are_equally_wide_share_a_residual_stream():
    assert streams(MOBILENET_V2, MobileNetV2Config()) == {
        **{"stem": 32, "first": 16, "hidden0": 24, "hidden2": 32, "hidden5": 64, "hidden9": 96},
        **{"hidden12": 160, "hidden15": 320, "top": 1280},
    }
    b0 = EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0)
    assert streams(EFFICIENTNET, b0) == {
        **{"stem": 32, "hidden0": 16, "hidden1": 24, "hidden3": 40, "hidden5": 80, "hidden8": 112},
        **{"hidden11": 192, "hidden15": 320, "top": 1280},
    }


def test_streams_that_become_equally_wide_by_a_factor_are_one_through_several_blocks():
    config = MobileNetV2Config(depth_multiplier=0.35)  # 16 and 24 are 8 then, which is the smallest width
    assert list(streams(MOBILENET_V2, config))[:3] == ["stem", "first", "hidden2"]
    spec, _ = sized(MOBILENET_V2, config)
    assert spec.params["layer.2.expand_1x1.convolution.weight"] == "mid2 first one one"
    assert spec.families["hidden"] == ("hidden2", "hidden5", "hidden9", "hidden12", "hidden15")


def test_a_block_that_widens_nothing_works_on_the_stream():
    bound = bound_of(tiny(EfficientNetForImageClassification))
    assert "mid0" not in bound.sizes
    assert "mid1" not in bound.sizes
    first, second = (f"efficientnet.encoder.blocks.{block}.projection.project_conv.weight" for block in (0, 2))
    assert bound.params[first].axes[:2] == (("hidden0",), ("stem",))
    assert bound.params[second].axes[:2] == (("hidden2",), ("mid2",))


@pytest.mark.parametrize("head", CLASSES)
def test_what_is_not_cut_stays_stock_and_no_block_is_dropped(head):
    model = tiny(head)
    assert "layers" not in bound_of(model).prunable
    assert is_stock(cut_by(model, Plan({})))
    bound = bound_of(model)
    assert not is_stock(cut_by(model, Plan({"top": (torch.arange(bound.sizes["top"] - 1),)})))


def test_groups_of_a_depthwise_convolution_follow_its_width():
    model = tiny(MobileNetV2ForImageClassification)
    _, sizes = searched(model, layout="per_layer")
    pruned = prune(model)
    stem = pruned.mobilenet_v2.conv_stem.conv_3x3.convolution
    assert (stem.groups, stem.in_channels, stem.out_channels) == (int(sizes["stem"]),) * 3
    for number, block in enumerate(pruned.mobilenet_v2.layer):
        assert block.conv_3x3.convolution.groups == int(sizes[f"mid{number}"])


@pytest.mark.parametrize("head", ONLY_PER_LAYER)
def test_a_cut_classifier_takes_other_labels(head, tmp_path):
    model = tiny(head)
    searched(model, layout="per_layer")
    pruned = prune(model)
    save_pruned(pruned, tmp_path / "out")
    options = dict(num_labels=5, ignore_mismatched_sizes=True)
    other = AutoModelForImageClassification.from_pretrained(tmp_path / "out", **options)
    assert other(**batch_for(other)).logits.shape == (2, 5)
    assert other.classifier.in_features == pruned.classifier.in_features < model.classifier.in_features


@pytest.mark.parametrize("layout", ["uniform", "padded"])
@pytest.mark.parametrize("head", ONLY_PER_LAYER)
def test_a_stock_layout_is_an_error_that_names_per_layer(head, layout):
    message = f"layout {layout}: the stock config of {head.config_class.model_type} does not hold all widths, "
    untouched(tiny(head), f"{message}its class derives them. Use layout: per_layer.", layout=layout)


def test_variants_that_are_not_described_are_errors():
    message = "mobilenet_v2 with first_layer_is_expansion = False in its config is not supported, only with True"
    untouched(tiny(MobileNetV2ForImageClassification, first_layer_is_expansion=False), message)
    with pytest.raises(
        ValueError, match=r"mobilenet_v2: parameter 'segmentation_head.conv_pool.convolution.weight' .* 0"
    ):
        attach_(tiny(MobileNetV2ForSemanticSegmentation), DMSConfig(target=0.9))


def test_an_image_that_is_too_small_for_the_network_is_an_error():
    sizes = dict(image_size=4, strides=[2, 2, 1], depthwise_padding=[])
    message = (
        r"A EfficientNetForImageClassification with this config cannot take an image of 2 × 4 × 4, the size that its "
        r"config names .*: .* Kernel size can't be greater than actual input size. Correct image_size in the config"
    )
    with pytest.raises(ValueError, match=message):
        attach_(tiny(EfficientNetForImageClassification, **sizes), DMSConfig(0.9, resource="macs", layout="per_layer"))


@pytest.mark.parametrize("head", CLASSES)
def test_a_cut_model_is_not_told_to_be_pruned_in_rounds_that_are_not_possible(head):
    pruned = cut_by(tiny(head), Plan({}))
    pruned.config.model_type = f"dms_{tiny(head).config.model_type}"
    with pytest.raises(ValueError, match=r"Search the dense model again with a smaller target\.$"):
        attach_(pruned, DMSConfig(target=0.5, layout="per_layer"))


@pytest.mark.parametrize("head", CLASSES)
def test_repair_and_supernets_say_that_they_are_not_for_these(head):
    model = tiny(head)
    plan = Plan({"top": (torch.arange(9),)})
    widths = r"repair: the blocks of a \w+ write residual streams of different widths"
    with pytest.raises(ValueError, match=widths):
        repair_(cut_by(model, plan), model, plan, [batch_for(model)])
    with pytest.raises(ValueError, match=widths):  # before a run, from the config alone
        check_repairable(model.to("meta"), bound_of(model))
    with pytest.raises(ValueError, match=r"supernet: the stock config of \w+ does not hold all widths"):
        enlarged_config(model.config, width=2, depth=1)
