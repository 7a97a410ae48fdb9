"""Networks in stages: one text for all of them, words for all of their dims, positions of a convolution."""

from dataclasses import replace

import pytest
import torch
from helpers.laws import EXACT, assert_same, batch_for, masked_cut_reloaded, searched, tiny
from helpers.refit import bound_of
from helpers.tiny import untouched
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2ForImageClassification,
    RegNetForImageClassification,
    ResNetForImageClassification,
)

from hf_dms import DMSConfig, attach_, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.convnext import CONVNEXT
from hf_dms.archs.llama import LLAMA
from hf_dms.archs.positions import recorded_run
from hf_dms.archs.resnet import RESNET
from hf_dms.archs.stages import in_stages
from hf_dms.gating.attach import gates_of
from hf_dms.refit.repairable import check_one_stack


def test_a_line_stands_for_one_line_a_stage_and_for_none_before_the_first():
    spec = replace(
        CONVNEXT,
        params={"in.weight": "hidden0 one", "s{s}.{i}.w": "mlp{s} hidden{s}", "d{s}.w": "hidden{s} hidden{s-1}"},
        heads={"ForX": {"out{s}.w": "label hidden{s}", "out.w": "label hidden{last}"}},
        must_equal=(("four hidden{s}", "mlp{s}"),),
    )
    found = in_stages(spec, 3)
    assert found.params == {
        "in.weight": "hidden0 one",
        **{f"s{stage}.{{i}}.w": f"mlp{stage} hidden{stage}" for stage in range(3)},
        **{"d1.w": "hidden1 hidden0", "d2.w": "hidden2 hidden1"},
    }
    assert found.heads["ForX"] == {f"out{s}.w": f"label hidden{s}" for s in range(3)} | {"out.w": "label hidden2"}
    assert found.must_equal == tuple((f"four hidden{stage}", f"mlp{stage}") for stage in range(3))
    assert found.layers == {f"layers{stage}": f"encoder.stages.{stage}.layers" for stage in range(3)}
    assert [(dim.size, dim.stack) for dim in found.dims[:2]] == [
        ("4 * hidden_sizes[0]", "layers0"),
        ("4 * hidden_sizes[1]", "layers1"),
    ]
    assert found.families["mlp"] == ("mlp0", "mlp1", "mlp2")
    assert in_stages(found, 5) is found  # it has no stages any more
    assert in_stages(LLAMA, 1) is LLAMA


def test_a_word_for_all_stages_means_the_dim_of_each():
    def gates(**options):
        model = tiny(ConvNextForImageClassification)
        attach_(model, DMSConfig(target=0.6, layout="per_layer", **options))
        return gates_of(model).dims

    assert list(gates(prune=("layers", "mlp1"))) == ["mlp1", "layers0", "layers1", "layers2"]
    steps = gates(prune=("mlp",), round_to={"mlp1": 5, "mlp": 4})
    assert [dim.step for dim in steps.values()] == [4, 5, 4]
    kept = gates(protect={"dims": ["mlp", "hidden0"], "min": {"hidden": 2, "hidden2": 3}})
    assert [dim.lowest for name, dim in kept.items() if name.startswith("hidden")] == [(2,), (3,)]
    assert not any(name.startswith("mlp") for name in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(prune=("heads",)),
            "dms.prune: convnext has no dim 'heads'. Its dims are mlp0, mlp1, mlp2, hidden0, .*; all stages' together: "
            "mlp, hidden, layers.$",
        ),
        (dict(layout="per_layer", round_to={"hidden": 7}), "dms.round_to.hidden0 = 7: no multiple of it lies"),
        (dict(prune=("mlp0", "mlp1", "hidden1")), "needs mlp0 = 4·hidden0, so hidden0 and mlp0 can only be pruned"),
        (dict(layout="per_layer", protect={"layers": [6]}), "dms.protect.layers: the model has layers 0 to 5, got 6"),
    ],
)
def test_requests_that_stages_cannot_serve_are_errors(options, message):
    untouched(tiny(ConvNextForImageClassification), message, **options)


def test_a_parameter_that_the_description_lacks_is_named():
    model = tiny(ConvNextModel)
    model.encoder.stages[1].layers[0].dwconv.extra = nn.Parameter(torch.zeros(3))
    untouched(model, r"Parameter 'encoder.stages.1.layers.0.dwconv.extra' has shape \(3,\) here, and does not exist in")


def test_positions_are_those_of_the_outputs_of_each_map():
    model = tiny(ConvNextForImageClassification, image_size=(16, 24))
    found = recorded_run(bound_of(model), model).positions
    stages = "convnext.encoder.stages"
    assert found["convnext.embeddings.patch_embeddings"] == 8 * 12
    assert found[f"{stages}.0.layers.1.dwconv"] == found[f"{stages}.0.layers.1.pwconv2"] == 8 * 12
    assert found[f"{stages}.1.downsampling_layer.1"] == found[f"{stages}.1.layers.2.pwconv1"] == 4 * 6
    assert (found[f"{stages}.2.layers.0.dwconv"], found["classifier"]) == (2 * 3, 1)


def test_each_stage_keeps_a_layer_and_the_first_module_of_a_stage_stays():
    model = tiny(ConvNextV2ForImageClassification)
    _, sizes = searched(model, prune=("layers",), share=0.0)
    assert [int(sizes[f"layers{stage}"]) for stage in range(3)] == [1, 1, 1]
    pruned = prune(model, inputs=batch_for(model))
    assert list(pruned.config.depths) == [1, 1, 1]
    assert [len(stage.downsampling_layer) for stage in pruned.base_model.encoder.stages] == [0, 2, 2]


def test_a_network_of_one_stage_is_written_as_one_of_several(tmp_path):
    sizes = dict(num_stages=1, hidden_sizes=[6], depths=[3])
    model = tiny(ConvNextForImageClassification, dtype=torch.float64, **sizes)
    _, found = searched(model, layout="per_layer", prune=("mlp",))
    assert len(set(found["mlp0"].tolist())) > 1
    *outputs, pruned = masked_cut_reloaded(model, found, tmp_path / "out")
    assert_same(*outputs, EXACT)
    (stack,) = pruned.config.dms_layers["stacks"]
    assert [layer["mlp0"] for layer in stack["sizes"]] == found["mlp0"].tolist()


def test_a_layer_that_a_line_names_by_its_number_stays():
    model = tiny(ResNetForImageClassification, depths=[3, 2, 1])
    bound = bound_of(model)
    assert bound.fixed_layers == {f"layers{stage}": {0} for stage in range(3)}
    assert "layers2" not in bound.prunable
    gates, sizes = searched(model, prune=("layers",), share=0.0)
    assert {name: int(size) for name, size in sizes.items()} == {"layers0": 1, "layers1": 1}
    assert [dim.protected for dim in gates.dims.values()] == [(0,), (0,)]
    assert list(prune(model, inputs=batch_for(model)).config.depths) == [1, 1, 1]
    shallow = tiny(ResNetForImageClassification, depths=[1, 1, 1])
    untouched(shallow, "Nothing is left to prune: no dim of dms.prune can be cut in this model", prune=("layers",))


def test_a_variant_has_the_lines_of_its_kind():
    basic, bottleneck = (
        bound_of(tiny(ResNetForImageClassification, layer_type=kind)) for kind in ("basic", "bottleneck")
    )
    assert ("reduced0" in basic.sizes, "reduced0" in bottleneck.sizes) == (False, True)
    assert (basic.sizes["mid0"], bottleneck.sizes["mid0"]) == (8, 2)


def test_the_stem_is_pruned_with_the_first_stage_where_the_two_are_one_stream():
    one, two = (bound_of(tiny(ResNetForImageClassification, embedding_size=size)) for size in (8, 5))
    assert ("embedding" in one.sizes, "embedding" in two.sizes) == (False, True)
    weight = "resnet.embedder.embedder.convolution.weight"
    assert [bound.params[weight].axes[0] for bound in (one, two)] == [("hidden0",), ("embedding",)]


def test_buffers_are_described_as_parameters_are():
    model = tiny(ResNetForImageClassification)
    name = "encoder.stages.{s}.layers.{i}.layer.1.normalization.running_var"
    missing = {line: axes for line, axes in RESNET.buffers.items() if line != name}
    with pytest.raises(
        ValueError, match=r"resnet: buffer 'resnet.encoder.stages.0.layers.0.layer.1.*var' .* matches 0"
    ):
        bind(replace(RESNET, buffers=missing), model)
    with pytest.raises(
        ValueError, match=r"buffer '.*layer.1.normalization.running_var' has shape \(2,\), but its descr"
    ):
        bind(replace(RESNET, buffers=RESNET.buffers | {name: "hidden{s}"}), model)


def test_widths_that_are_no_whole_multiples_are_an_error_where_they_go_together():
    model = tiny(ResNetForImageClassification, hidden_sizes=[10, 12, 16])
    message = (
        "layout uniform: this resnet has 10 units of hidden0, and 8 of 'four reduced0', which a search keeps equal"
    )
    untouched(model, message, layout="uniform")
    attach_(model, DMSConfig(target=0.7, layout="per_layer"))


def test_a_search_over_refitted_weights_says_early_that_stages_are_not_for_it():
    bound = bound_of(tiny(ConvNextForImageClassification))
    with pytest.raises(ValueError, match=r"convnext has several stacks .* with one only. Search over masks \(dms.sear"):
        check_one_stack(bound)


def test_a_layer_without_a_dim_keeps_all_of_it_where_layers_have_sizes_of_their_own():
    bound = bound_of(model := tiny(RegNetForImageClassification))
    assert [bound.rows_without(name) for name in ("squeeze0", "squeeze1", "groups1", "first1")] == [[0], [0], [], []]
    assert "squeeze2" not in bound.prunable  # its stage has one layer
    assert not [limit for limit in bound.spec.must_equal if "squeeze2" in limit]
    _, sizes = searched(model, layout="per_layer", prune=("squeeze",), share=0.0)
    assert (sizes["squeeze0"].tolist(), sizes["squeeze1"].tolist()) == ([4, 1], [6, 1, 1])


def test_units_of_a_grouped_convolution_are_whole_groups(tmp_path):
    model = tiny(RegNetForImageClassification, dtype=torch.float64)
    _, sizes = searched(model, layout="per_layer", prune=("groups",))
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    for stage, of_stage in enumerate(pruned.base_model.encoder.stages):
        for layer, block in enumerate(of_stage.layers):
            convolution, groups = block.layer[1].convolution, int(sizes[f"groups{stage}"][layer])
            assert (convolution.groups, convolution.in_channels) == (groups, 8 * groups)
            assert convolution.weight.shape == (8 * groups, 8, 3, 3)


def test_a_regnet_that_keeps_the_resolution_in_its_first_stage_is_not_covered():
    model = tiny(RegNetForImageClassification, downsample_in_first_stage=False)
    untouched(model, "regnet with downsample_in_first_stage = False in its config is not supported, only with True")


def test_a_config_that_lists_fewer_layers_than_it_counts_is_an_error():
    """Only where the config does not hold their number (MobileViT) are layers beyond the listed ones dropped."""
    model = tiny(ResNetForImageClassification)
    searched(model, layout="per_layer", prune=("mid",))
    config = prune(model, inputs=batch_for(model)).config
    config.dms_layers["stacks"][0]["sizes"].pop()
    with pytest.raises(ValueError, match=r"dms_layers has the sizes of 1 layers of .*, and the config asks for 2"):
        AutoModelForImageClassification.from_config(config)
