"""Swin: windows that every second block shifts, norms over four neighbours, attention inside windows."""

import logging

import pytest
import torch
from helpers.laws import batch_for, is_stock, macs_by_the_flop_counter, same_tensors, tiny
from helpers.refit import bound_of, cut_by
from helpers.tiny import untouched
from transformers import (
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
)

from hf_dms.archs.bind import bind
from hf_dms.archs.costs import build_cost
from hf_dms.archs.enlarge import enlarged_config
from hf_dms.archs.skeleton import skeleton
from hf_dms.archs.swin import SWIN
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.plan import Plan
from hf_dms.cut.verify import outputs_of
from hf_dms.errors import HfDmsError
from hf_dms.gating.places import norm_spans, norms
from hf_dms.masked_ops import Span


def shifts(model):
    return [[block.shift_size for block in stage.blocks] for stage in model.base_model.encoder.layers]


def test_a_block_keeps_its_shift_where_blocks_before_it_are_dropped(tmp_path):
    model = tiny(SwinForImageClassification, dtype=torch.float64, depths=[4, 2, 1])
    assert shifts(model) == [[0, 1, 0, 1], [0, 1], [0]]
    pruned = cut_by(model, Plan({"layers0": (torch.tensor([1, 2]),), "layers1": (torch.tensor([1]),)}))
    save_pruned(pruned, tmp_path)
    reloaded = type(pruned).from_pretrained(tmp_path, dtype=torch.float64)
    assert shifts(pruned) == shifts(reloaded) == [[1, 0], [1], [0]]
    assert list(pruned.config.depths) == [2, 1, 1]
    assert not is_stock(pruned)  # a stock stage begins without a shift, whatever the widths
    assert same_tensors(reloaded, pruned)
    stages = model.swin.encoder.layers
    for stage, dropped in ((0, (3, 0)), (1, (0,))):
        for block in dropped:
            del stages[stage].blocks[block]
    batch = batch_for(model)
    assert torch.equal(outputs_of(pruned, batch), outputs_of(model, batch))
    assert torch.equal(outputs_of(reloaded, batch), outputs_of(model, batch))


def test_the_norm_in_front_of_a_merging_is_one_over_four_neighbours():
    bound = bound_of(tiny(SwinModel))
    merging = "encoder.layers.0.downsample.norm"
    found = list(norms(bound, "hidden0"))
    assert [path for path in found if ".blocks." not in path] == ["embeddings.norm", merging]
    assert {path: norm_spans(bound, path, "norms.hidden0") for path in ("embeddings.norm", merging)} == {
        "embeddings.norm": [Span(1, 6, 1)],
        merging: [Span(4, 6, 1)],
    }
    assert [path for path in norms(bound, "hidden2") if ".blocks." not in path] == ["layernorm"]


@pytest.mark.parametrize("image", [224, 250])
def test_attention_costs_what_its_windows_do(image):
    """At 250 pixels the sides of the stages are 63, 32, 16 and 8, which windows of 7 do not divide all."""
    model = skeleton(SwinForImageClassification, SwinConfig(image_size=image, num_labels=1000)).eval()
    bound = bind(SWIN, model)
    sizes = {name: torch.full((bound.rows(name),), size) for name, size in bound.sizes.items()}
    counted = float(build_cost(bound, model, "macs", "model", None).count(sizes))
    pixels = torch.empty(1, 3, image, image, device="meta")
    found = macs_by_the_flop_counter(model, "model", {"pixel_values": pixels}, 1)
    assert counted == pytest.approx(found, rel=1e-12)
    assert image != 224 or round(counted / 1e9, 1) == 4.5  # Swin-T's in Table 1 of arXiv 2103.14030


def test_an_image_smaller_than_a_window_is_one_error_without_a_traceback_in_the_log():
    log, records = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    model = tiny(SwinModel, window_size=16)
    untouched(model, "A SwinModel .* cannot take an image of 2 × 16 × 16", resource="macs", layout="per_layer")
    log.removeHandler(handler)
    assert records == []


def test_variants_that_are_not_described_are_errors():
    untouched(tiny(SwinForMaskedImageModeling), r"swin: parameter 'swin.embeddings.mask_token' \(1, 1, 6\) matches 0 l")
    untouched(tiny(SwinBackbone), "SwinBackbone names its outputs after layers.* Load the base model instead")
    message = "supernet: the stock config of swin does not hold all widths, its class derives them"
    with pytest.raises(HfDmsError, match=message):
        enlarged_config(tiny(SwinModel).config, width=2, depth=1)
