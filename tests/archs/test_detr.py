"""DETR beside the laws that all architectures obey: a backbone that stays whole, two stacks, two attentions a layer."""

import re

import pytest
import torch
from helpers.laws import batch_for, macs_by_the_flop_counter, searched, tiny
from helpers.refit import bound_of, cut_by
from helpers.tiny import relative_difference, untouched
from transformers import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrModel,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrModel,
    RTDetrForObjectDetection,
    RTDetrModel,
)

from hf_dms import DMSConfig, attach_, prune, repair_
from hf_dms.archs.costs import build_cost
from hf_dms.cut.plan import Plan
from hf_dms.gating.attach import gates_of
from hf_dms.refit.layerwise import LayerWalk

HEADED = [DetrForObjectDetection, ConditionalDetrForObjectDetection, RTDetrForObjectDetection]
HEADS = ["encoder_heads", "decoder_heads", "cross_heads"]
DIMS = [*HEADS, "encoder_mlp", "decoder_mlp", "encoder_layers", "decoder_layers"]


def images(seed, batches):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 2, 64, 96, generator=generator)} for _ in range(batches)]


# ---- what is refused, and by which name ----
def test_a_detr_with_losses_of_every_layer_is_refused():
    message = "detr with auxiliary_loss = True in its config is not supported, only with False"
    untouched(tiny(DetrForObjectDetection, auxiliary_loss=True), message)


@pytest.mark.parametrize("maps", [[], [1, 2]])
def test_an_rt_detr_with_attention_on_several_maps_or_none_is_refused(maps):
    message = (
        rf"rt_detr with encode_proj_layers = {re.escape(str(maps))} in its config is not supported, only with one en"
    )
    untouched(tiny(RTDetrModel, encode_proj_layers=maps), message)


@pytest.mark.parametrize(("head", "part"), [(RTDetrModel, "encoder.aifi.0"), (DetrModel, "encoder")])
def test_a_stack_without_layers_is_refused(head, part):
    message = (
        rf"detr with 0 layers in '{part}.layers' \(encoder_layers\), as its config says, is not supported, only with"
    )
    untouched(tiny(head, encoder_layers=0), message)


def test_a_head_that_is_not_described_is_an_error_that_names_a_parameter():
    stages = dict(model_type="resnet", hidden_sizes=4 * [8], depths=4 * [1], embedding_size=5)
    backbone = stages | dict(num_channels=2, out_features=[f"stage{number}" for number in (1, 2, 3, 4)])
    model = DetrForSegmentation(DetrForSegmentation.config_class(d_model=32, backbone_config=backbone, num_channels=2))
    untouched(model, r"detr: parameter 'detr.model.backbone.\S+' .* matches 0 lines of the description of a DetrForSeg")


def test_without_dims_in_the_request_a_stock_detr_keeps_its_heads():
    model = tiny(DetrForObjectDetection)
    attach_(model, DMSConfig(target=0.9))
    assert list(gates_of(model).dims) == DIMS[3:]


def test_decoder_layers_that_read_more_than_the_stream_are_never_dropped():
    message = "Nothing is left to prune: no dim of dms.prune can be cut in this model"
    untouched(tiny(ConditionalDetrModel), message, prune=("decoder_layers",))


# ---- what is counted ----
def test_a_backbone_is_counted_whole():
    model = tiny(DetrModel)
    bound = bound_of(model)
    backbone = [name for name in bound.params if name.startswith("backbone.")]
    assert backbone == [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    assert bound.product(bound.params["backbone.model.embedder.embedder.convolution.weight"].axes[0]) == 5
    assert build_cost(bound, model, "params", "model", None).model[()] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".layers." not in name or name in backbone
    )


def test_the_cost_of_an_attention_is_in_queries_times_keys():
    model = tiny(DetrModel)
    scores = {}
    for queries in (5, 10):
        model.config.num_queries = queries
        cost = build_cost(bound_of(model), model, "macs", "model", None).stacks["decoder_layers"]
        scores[queries] = {dim: float(cost[dim,][0]) for dim in ("decoder_heads", "cross_heads")}
    width, places, head = 24, 8 * 12, 8  # a feature map has an eighth of the height and width of 64 × 96 pixels
    for queries, found in scores.items():
        assert found["decoder_heads"] == head * (4 * width * queries + 2 * queries * queries)
        assert found["cross_heads"] == head * (2 * width * (queries + places) + 2 * queries * places)


@pytest.mark.parametrize("cls", [DetrModel, RTDetrModel])
def test_whole_modules_and_lists_of_them_are_counted_as_the_flop_counter_does(cls):
    model = tiny(cls)
    bound = bound_of(model)
    counted = build_cost(bound, model, "macs", "model", None)
    sizes = {name: torch.tensor([size]) for name, size in bound.sizes.items()}
    batch = {"pixel_values": torch.zeros(1, 2, 64, 96)}
    assert float(counted.count(sizes)) == macs_by_the_flop_counter(model, "model", batch, 1)


# ---- a search and a repair of both stacks ----
@pytest.mark.parametrize("head", HEADED)
def test_importance_of_every_dim_follows_from_boxes_and_classes(head):
    model = tiny(head)
    attach_(model, DMSConfig(target=0.99, layout="per_layer"))
    gates = gates_of(model)
    assert list(gates.dims) == (DIMS if head is DetrForObjectDetection else DIMS[:-1])
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) / 2} for _ in range(2)]
    model.train()(**batch_for(model), labels=labels).loss.backward()
    gates.update_importance_()
    assert all((gates.raw_importance(name) > 0).any(-1).all() for name in gates.dims)


@torch.no_grad()
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("cls", [DetrModel, ConditionalDetrModel, RTDetrModel])
def test_a_walk_through_encoder_and_decoder_computes_what_the_model_computes(cls, offload, tmp_path):
    model = tiny(cls)
    (batch,) = images(1, 1)
    walk = LayerWalk(model, bound_of(model), [batch], tmp_path if offload else None)
    for layer in range(len(walk.layers)):
        walk.advance(layer)
    expected = model(**batch).last_hidden_state
    found = walk.hidden[0] if cls is RTDetrModel else model.decoder.layernorm(walk.hidden[0])
    assert relative_difference(found, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("head", HEADED)
def test_a_repair_brings_boxes_and_classes_closer_on_held_out_images(head):
    model = tiny(head)
    kept = {"encoder_mlp": 2 * (torch.arange(12),), "decoder_mlp": 3 * (torch.arange(12),)}
    kept |= {"cross_heads": 3 * (torch.tensor([0, 2]),)}
    kept |= {"decoder_layers": (torch.tensor([0, 2]),)} if head is DetrForObjectDetection else {}
    pruned = cut_by(model, Plan(kept))
    (held_out,) = images(2, 1)
    expected = model(**held_out)

    def errors():
        found = pruned(**held_out)
        return [relative_difference(found[name], expected[name]) for name in ("last_hidden_state", "pred_boxes")]

    before = errors()
    repair_(pruned, model, Plan(kept), images(1, 12))
    assert all(after < 0.9 * earlier for earlier, after in zip(before, errors()))


@torch.no_grad()
def test_a_repair_compares_the_same_places_of_an_image_where_queries_are_chosen():
    """A cut encoder scores places in another order. If it chose alone, whole decoder layers would change."""
    model, batches = tiny(RTDetrModel, seed=2), images(1, 8)
    kept = {"encoder_mlp": 2 * (torch.arange(12),)}
    pruned = cut_by(model, Plan(kept))
    bound = bound_of(model)
    teacher = LayerWalk(model, bound, batches)
    students = [LayerWalk(pruned, bound, batches, leader=leader) for leader in (None, teacher)]
    for walk in (teacher, *students):
        for layer in range(2):  # the encoder
            walk.advance(layer)
    alone, led = (relative_difference(walk.hidden[0], teacher.hidden[0]) for walk in students)
    assert led < alone / 2
    repair_(pruned, model, Plan(kept), batches)
    names = [name for name, _ in model.named_parameters() if name.startswith("decoder.layers")]
    changed = max(relative_difference(pruned.get_parameter(name), model.get_parameter(name)) for name in names)
    assert changed < 0.1  # 0.8 if it chose alone


def test_a_cut_keeps_the_attention_implementations_of_its_configs():
    model = tiny(DetrForObjectDetection)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.backbone_config._attn_implementation == "eager"  # a ResNet has no other
    searched(model, layout="per_layer")
    pruned = prune(model, inputs=batch_for(model))
    assert pruned.config._attn_implementation == "sdpa"
    assert pruned.config.backbone_config._attn_implementation == "eager"
