"""What is particular to single architectures, beside the laws that all obey (test_encoders.py and test_decoders.py)."""

import pytest
import torch
from helpers.laws import EXACT, SHIPPED, assert_same, batch_for, masked_cut_reloaded, searched, tiny
from helpers.tiny import lowest_target, search_, untouched
from transformers import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    Data2VecVisionForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ElectraForMaskedLM,
    ElectraForSequenceClassification,
    ElectraModel,
    YolosForObjectDetection,
)

from hf_dms import DMSConfig, attach_, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.electra import ELECTRA
from hf_dms.cut.prune import make_plan
from hf_dms.gating.attach import gates_of
from hf_dms.gating.places import norms, unnormed
from hf_dms.gating.rounding import round_sizes

LAYOUTS = ("uniform", "per_layer")


# ---- ELECTRA: embeddings of a width of their own, or of the hidden size ----
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("embedding_size", "expected"), [(24, None), (10, 10)])
@pytest.mark.parametrize("head", [ElectraModel, ElectraForMaskedLM])
def test_embeddings_of_the_hidden_size_are_pruned_with_it(head, embedding_size, expected, layout, tmp_path):
    model = tiny(head, dtype=torch.float64, embedding_size=embedding_size)
    _, sizes = searched(model, layout=layout, prune=("heads", "hidden"))
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.config.hidden_size < 24
    assert pruned.config.embedding_size == (expected or pruned.config.hidden_size)
    assert ("embeddings_project" in dict(pruned.base_model.named_children())) is (expected is not None)


def test_a_dim_that_is_another_one_loses_its_name():
    bound = bind(ELECTRA, tiny(ElectraForMaskedLM, embedding_size=24))
    assert "embedding" not in [dim.name for dim in bound.spec.dims]
    assert bound.params["generator_lm_head.weight"].axes == (("vocab",), ("hidden",))
    assert {"electra.embeddings.LayerNorm", "generator_predictions.LayerNorm"} < set(norms(bound, "hidden"))
    assert list(unnormed(bound, "hidden")) == []
    bound = bind(ELECTRA, tiny(ElectraForMaskedLM))
    assert bound.spec is ELECTRA
    assert bound.params["generator_lm_head.weight"].axes == (("vocab",), ("embedding",))
    assert list(norms(bound, "hidden")) == [path for path in norms(bound, "hidden") if ".layer." in path]
    assert list(unnormed(bound, "hidden")) == ["electra.embeddings_project"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hidden_size_never_becomes_that_of_the_embeddings(layout):
    """The stock class would have no projection between them; heads of 6 units are 12 of hidden in layout uniform."""
    dim, excluded = ("heads", 2) if layout == "uniform" else ("hidden", 12)

    def rounded(target=None, **options):
        model = tiny(ElectraForSequenceClassification, embedding_size=12)
        attach_(model, DMSConfig(target=1.0, layout=layout, prune=("heads", "hidden"), **options))
        search_(model)
        gates = gates_of(model)
        config, bound = gates.attachment.config, gates.attachment.bound
        config.target = target or lowest_target(gates, bound, config, model.config)
        return gates, round_sizes(gates, bound, config, model.config)

    def size(target=None, **protect):
        return int(rounded(target, protect=protect)[1][dim][0])

    assert size(min={dim: excluded}) == excluded + 1
    assert size(1.0, max={dim: excluded}) == excluded - 1
    message = f"leave {dim} no size but {excluded}, and with that size the stock electra class builds a different net"
    with pytest.raises(ValueError, match=message):
        size(min={dim: excluded}, max={dim: excluded})
    for target in torch.linspace(0.4, 0.95, 12).tolist():
        gates, sizes = rounded(target)
        kept = int(sizes[dim][0])
        assert kept != excluded
        if kept < gates.dims[dim].units:
            more = torch.tensor([kept + (2 if kept + 1 == excluded else 1)])
            larger = {"hidden": more} if layout == "per_layer" else {"heads": more.expand(3), "hidden": 6 * more}
            larger["pool"] = larger["hidden"]
            assert gates.count(gates.dense_sizes() | sizes | larger) > target * gates.dense_resource


# ---- DINOv2: its config knows the MLP's width as a multiple of the hidden size ----
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prune", [("mlp",), ("hidden",), ("mlp", "hidden", "layers")], ids="-".join)
def test_a_stock_dinov2_has_a_multiple_of_the_hidden_size_for_its_mlp(prune, layout, tmp_path):
    model = tiny(Dinov2ForImageClassification)
    _, sizes = searched(model, prune=prune, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)
    config = pruned.config
    widths = [layer.mlp.fc1.out_features for layer in pruned.dinov2.encoder.layer]
    if layout == "uniform":
        assert type(config) is Dinov2Config
        assert set(widths) == {config.hidden_size * config.mlp_ratio}
    else:
        assert widths == [config.per_layer_config[i].intermediate_size for i in range(len(widths))]
    assert config.stage_names == ["stem", *(f"stage{i + 1}" for i in range(len(widths)))]


def test_sizes_that_no_stock_dinov2_has_are_an_error_that_names_per_layer():
    options = dict(prune=("mlp",), round_to={"mlp": 7})  # no multiple of 24 and 7 is at most 72
    with pytest.raises(ValueError, match=r"no allowed sizes make 1·hidden a divisor of mlp, .* Use layout: per_layer"):
        attach_(tiny(Dinov2Model), DMSConfig(target=0.9, **options))
    attach_(tiny(Dinov2Model), DMSConfig(target=0.9, layout="per_layer", **options))


def test_variants_that_are_not_described_are_errors():
    with pytest.raises(ValueError, match=r"dinov2 with use_swiglu_ffn = True in its config is not supported"):
        attach_(tiny(Dinov2Model, use_swiglu_ffn=True), DMSConfig(target=0.9))
    with pytest.raises(
        ValueError, match=r"Dinov2Backbone names its outputs after layers.* Load the base model instead"
    ):
        attach_(tiny(Dinov2Backbone), DMSConfig(target=0.9))


# ---- BEiT: tables of biases, with a column for each head ----
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", [BeitForImageClassification, Data2VecVisionForImageClassification])
def test_a_table_for_all_layers_has_one_choice_of_heads(head, layout, tmp_path):
    model = tiny(head, dtype=torch.float64, use_shared_relative_position_bias=True)
    gates, sizes = searched(model, layout=layout)
    assert gates.dims["heads"].rows == 1
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    tables = {name: tensor for name, tensor in pruned.named_parameters() if name.endswith("position_bias_table")}
    assert len(tables) == 1 + pruned.config.num_hidden_layers
    assert {table.shape[1] for table in tables.values()} == {int(sizes["heads"])} != {4}


def test_a_table_in_each_layer_keeps_the_columns_of_its_heads():
    model = tiny(BeitForImageClassification)
    gates, sizes = searched(model, prune=("heads",), layout="per_layer")
    kept = make_plan(gates, sizes).kept["heads"]
    assert len({tuple(heads.tolist()) for heads in kept}) > 1
    for layer, dense, heads in zip(prune(model).beit.layers, model.beit.layers, kept):
        table, whole = (each.relative_position_bias.relative_position_bias_table for each in (layer, dense))
        assert torch.equal(table, whole[:, heads])


@pytest.mark.parametrize(
    ("head", "parameter"),
    [(BeitForMaskedImageModeling, "lm_head.weight"), (BeitForSemanticSegmentation, "fpn.fpn1.conv_transpose1.weight")],
)
def test_heads_of_beit_that_are_not_described_are_errors_that_name_a_parameter(head, parameter):
    config = {} if head is BeitForMaskedImageModeling else dict(num_hidden_layers=4, out_indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=f"beit: parameter '{parameter}' .* matches 0 lines of the description of a"):
        attach_(tiny(head, **config), DMSConfig(target=0.9))


# ---- YOLOS: detection tokens, and two MLPs that read them ----
def test_yolos_with_embeddings_between_its_layers_is_refused():
    message = "yolos with use_mid_position_embeddings = True in its config is not supported, only with False"
    untouched(tiny(YolosForObjectDetection, use_mid_position_embeddings=True), message)


def test_importance_of_every_dim_of_a_detector_follows_from_its_outputs():
    model = tiny(YolosForObjectDetection)
    attach_(model, DMSConfig(target=0.5, layout="per_layer"))
    gates = gates_of(model)
    assert list(gates.dims) == ["heads", "mlp", "hidden", "layers", "class_1", "class_2", "box_1", "box_2"]
    outputs = model.train()(**batch_for(model))
    (outputs.logits.square().mean() + outputs.pred_boxes.square().mean()).backward()
    gates.update_importance_()
    assert all((gates.raw_importance(name) > 0).any(-1).all() for name in gates.dims)


def test_widths_inside_a_detectors_heads_keep_the_hidden_size_and_choose_their_own_units():
    model = tiny(YolosForObjectDetection)
    gates, sizes = searched(model, layout="per_layer", prune=("hidden",))
    assert len({int(sizes[name]) for name in ("hidden", "class_1", "class_2", "box_1", "box_2")}) == 1
    assert gates.prune_ratio.shape == (1,)
    kept = make_plan(gates, sizes).kept
    assert not torch.equal(kept["class_1"][0], kept["box_1"][0])
