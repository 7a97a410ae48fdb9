"""Encoders obey the laws that Llama does: masked = cut = reloaded, counted = real, stock where the layout says so."""

import itertools
import math

import pytest
import torch
from helpers.encoders import (
    DETRS,
    DIMS,
    HEADS,
    MOBILES,
    MOBILEVITS,
    PER_LAYER_ONLY,
    REGNETS,
    RELATIVES,
    RESNETS,
    RT_DETRS,
    STACKED,
    STAGED,
    SWINS,
    TIED,
    TWINS,
    dims_of,
    possible,
)
from helpers.laws import (
    EXACT,
    SHIPPED,
    assert_same,
    batch_for,
    is_stock,
    macs_by_the_flop_counter,
    masked_cut_reloaded,
    searched,
    tiny,
    written_sizes,
)
from helpers.marks import ordinary_if
from helpers.tiny import relative_difference, search_
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BeitForImageClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ConvNextV2ForImageClassification,
    Dinov2ForImageClassification,
    ElectraForMaskedLM,
    ElectraForSequenceClassification,
    RegNetForImageClassification,
    ResNetForImageClassification,
    SwinForImageClassification,
    ViTForImageClassification,
    ViTModel,
)

from hf_dms import DMSConfig, attach_, detach_, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.cut.plan import Plan
from hf_dms.cut.prune import make_plan
from hf_dms.cut.slicing import cut
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import gates_of
from hf_dms.gating.rounding import round_sizes

# ---- masked = cut = reloaded ----
# In the ordinary suite each dim alone for one of each kind: with and without batch norms, groups, attention in windows.
ALONE = {ConvNextV2ForImageClassification, ResNetForImageClassification, RegNetForImageClassification}
ALONE |= {SwinForImageClassification}
CANNOT = {  # by layout and whether a response norm is in the way
    (
        "uniform",
        False,
    ): r"needs (mlp0 = 4·hidden0|mid0 = 1·reduced0|hidden0 = 4·reduced0|hidden0 = 8·groups0|squeeze0 = 2·groups0"
    r"|first1 = 2·groups0|embedding = 4·first0), so .* can only be pruned toget",
    (
        "padded",
        False,
    ): r"ties (hidden0|first1|embedding) to '(mlp0|four reduced0|group_width0 groups0|quarter0 groups0|four first0)', "
    r"and \w+ cannot be padded. Prune others only, as prun",
    (
        "padded",
        True,
    ): r"divides by a mean over mlp0, which would count the zeros. Prune others only, as prune: \[layers0",
}
HELD = r"needs (hidden = 6|encoder_hidden = 4)·encoder_heads, and (encoder_)?hidden cannot be pruned, so encoder_h"


def prefixes(head):
    """Each dim alone, and the first two, three, ... together."""
    dims = dims_of(head)
    return [*((dim,) for dim in dims), *(dims[:count] for count in range(2, len(dims) + 1))]


@pytest.mark.parametrize(
    ("head", "dims", "layout"),
    ordinary_if(
        lambda head, dims, layout: (
            "For" in head.__name__
            and (dims == dims_of(head) or (len(dims) == 1 and layout == "per_layer" and head in ALONE))
        ),
        [
            (head, dims, layout)
            for head in STACKED
            for dims in prefixes(head)
            for layout in ("uniform", "per_layer", "padded")
        ],
    ),
)
def test_masked_equals_cut_equals_reloaded_in_stages(head, dims, layout, tmp_path):
    if not possible(head, dims, layout):
        averaged = layout == "padded" and head.config_class.model_type == "convnextv2" and "mlp" in dims
        only = f"{layout}: the stock config of .* does not hold all widths"
        message = only if head in PER_LAYER_ONLY else HELD if head in DETRS else CANNOT[layout, averaged]
        with pytest.raises(ValueError, match=message):
            attach_(tiny(head), DMSConfig(target=0.9, prune=dims, layout=layout))
        return
    model = tiny(head, dtype=torch.float64)
    gates, sizes = searched(model, prune=dims, layout=layout)
    bound = gates.attachment.bound
    named = [name for dim in dims for name in bound.spec.families.get(dim, (dim,))]
    assert sorted(sizes) == sorted(name for name in bound.prunable if name in named)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("head", "dims"),
    ordinary_if(
        lambda head, dims: dims == DIMS or head in (BertForSequenceClassification, ViTForImageClassification),
        itertools.product(
            (*HEADS, ElectraForMaskedLM, Dinov2ForImageClassification, BeitForImageClassification),
            [*[(dim,) for dim in DIMS], ("heads", "hidden"), DIMS],
        ),
    ),
)
def test_masked_equals_cut_equals_reloaded(head, dims, layout, tmp_path):
    if not possible(head, dims, layout):
        instead = "per_layer or padded" if dims == ("heads",) else "per_layer"
        message = f"needs hidden = 6·heads, so .* only be pruned together. Prune both, or use layout: {instead}.$"
        with pytest.raises(ValueError, match=message):
            attach_(tiny(head), DMSConfig(target=0.9, prune=dims, layout=layout))
        return
    model = tiny(head, dtype=torch.float64)
    _, sizes = searched(model, prune=dims, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    assert layout == "per_layer" or is_stock(pruned)


ALL = sorted({*HEADS, *RELATIVES, *TWINS, *STACKED}, key=lambda head: head.__name__)
FIRST = {head.config_class: head for head in reversed(ALL)}
LAST = {head.config_class: head for head in ALL}


@pytest.mark.parametrize(
    ("head", "layout"),
    ordinary_if(
        lambda head, layout: head is (FIRST if layout == "uniform" else LAST)[head.config_class],
        [
            each
            for each in itertools.product(ALL, ["uniform", "per_layer"])
            if possible(each[0], dims_of(each[0]), each[1])
        ],
    ),
)
def test_masked_equals_cut_equals_reloaded_as_shipped(head, layout, tmp_path):
    model = tiny(head)
    _, sizes = searched(model, layout=layout)
    *outputs, _ = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)


@st.composite
def requests(draw):
    heads, layout = draw(st.integers(1, 4)), draw(st.sampled_from(["uniform", "per_layer", "padded"]))
    head = draw(st.sampled_from(HEADS + RELATIVES + STACKED))
    layout = "per_layer" if head in PER_LAYER_ONLY else layout
    config = (
        stages(draw, head)
        if head in STACKED
        else dict(
            num_attention_heads=heads,
            hidden_size=heads * draw(st.sampled_from([2, 3, 5])),
            intermediate_size=draw(st.integers(1, 12)),
            num_hidden_layers=draw(st.integers(1, 3)),
        )
    )
    if head.main_input_name == "pixel_values" and head not in STACKED:
        config |= patches(draw, head, layout)
    if head.config_class.model_type == "electra":
        config["embedding_size"] = draw(st.sampled_from([config["hidden_size"], 1, 5, 7]))
    lacks = {"basic": ("reduced",), "x": ("squeeze", "first")}.get(config.get("layer_type", ""), ())
    lacks += ("first",) if head in MOBILEVITS and len({*config["neck_hidden_sizes"][:2]}) == 1 else ()
    all_dims = tuple(dim for dim in dims_of(head) if dim not in lacks)
    dims = tuple(draw(st.lists(st.sampled_from(all_dims), min_size=1, unique=True)))
    dims += ("top",) if head in MOBILES and "top" not in dims else ()  # others may all be the stem's
    if not possible(head, dims, layout):
        tied = TIED.get(head.config_class.model_type, set()) & set(all_dims)
        padded = tuple(dim for dim in dims if possible(head, (dim,), layout))
        dims = (padded or ("layers",)) if layout == "padded" else (*sorted({*dims} | tied),)
        dims = ("mlp", "layers") if head in DETRS else dims
    if head in RESNETS + REGNETS and {*dims} <= {"layers", "squeeze"} and max(config["depths"]) == 1:
        inner = "mid" if head in RESNETS else "groups"
        dims = ("layers", inner) if layout == "padded" else ("layers", *all_dims[:-1])  # no layer of it can go
    options = dict(
        prune=dims,
        layout=layout,
        resource=draw(st.sampled_from(["params", "macs"])),
        resource_scope=draw(st.sampled_from(["model", "layers"])),
    )
    return head, config, options, draw(st.integers(0, 1000)), draw(st.floats(0, 1))


def patches(draw, head, layout):
    """A config of what turns an image into tokens, and of what else image transformers can have or not."""
    family = head.config_class.model_type
    if family in ("beit", "data2vec-vision"):
        flags = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_mean_pooling")
        flags += ("use_absolute_position_embeddings", "use_mask_token")
        config = {flag: draw(st.booleans()) for flag in flags} | {"patch_size": 4}
        if family == "data2vec-vision" and layout == "padded":  # one choice of heads for all layers cannot be padded
            config["use_shared_relative_position_bias"] = False
        config["layer_scale_init_value"] = draw(st.sampled_from([0.0, 0.1]))
        config |= draw(st.sampled_from([{}, {"head_dim": 3}])) if family == "beit" else {}
        square = config["use_absolute_position_embeddings"]  # others it interpolates, for square numbers of patches
        return config | {"image_size": draw(st.sampled_from([8] if square else [8, [8, 12]]))}
    if family == "yolos":
        config = dict(image_size=draw(st.sampled_from([[8, 8], [8, 12]])), patch_size=4)
        return config | dict(qkv_bias=draw(st.booleans()))
    sizes = [8] if family == "dinov2" else [8, (8, 12)]  # others it interpolates, for square numbers of patches
    config = dict(image_size=draw(st.sampled_from(sizes)), patch_size=draw(st.sampled_from([4, (4, 2)])))
    more = draw(st.sampled_from([{}, {"head_dim": 3}, {"pooler_output_size": 5}]))
    return config | more | dict(qkv_bias=draw(st.booleans()))


def stages(draw, head):
    """A config of a network in stages, or of several stacks."""
    if head in MOBILES:
        return mobile(draw, head)
    if head in DETRS:
        return detr(draw, head)
    if head in SWINS:
        return windows(draw)
    if head in MOBILEVITS:
        return mobilevit(draw)
    count = draw(st.integers(1, 3))
    widths = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    config = dict(
        depths=draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        image_size=draw(st.sampled_from([16, (16, 24)])),
    )
    if head in REGNETS:
        group = draw(st.sampled_from([4, 8]))
        config |= dict(layer_type=draw(st.sampled_from(["x", "y"])), groups_width=group)
        return config | dict(
            hidden_sizes=[group * width for width in widths], embedding_size=draw(st.sampled_from([4, 12]))
        )
    if head not in RESNETS:
        patch = draw(st.sampled_from([2, (4, 2)]))
        return config | dict(num_stages=count, hidden_sizes=widths, patch_size=patch)
    config |= dict(layer_type=draw(st.sampled_from(["basic", "bottleneck"])))
    config |= dict(downsample_in_first_stage=draw(st.booleans()), downsample_in_bottleneck=draw(st.booleans()))
    widths = [4 * width for width in widths] if config["layer_type"] == "bottleneck" else widths
    return config | dict(hidden_sizes=widths, embedding_size=draw(st.sampled_from([widths[0], 3])))


def detr(draw, head):
    """A config of an encoder and a decoder behind a backbone."""
    counts = [1, 2, 4] if head in RT_DETRS else [1, 2, 3, 4]  # it warns of heads whose size is no power of 2
    heads = {f"{part}_attention_heads": draw(st.sampled_from(counts)) for part in ("encoder", "decoder")}
    sizes = {f"{part}_{size}": draw(st.integers(1, 5)) for part in ("encoder", "decoder") for size in SIZES_OF_PARTS}
    widths = dict(d_model=16, num_queries=draw(st.integers(1, 6)))
    if head in RT_DETRS:
        return heads | sizes | widths | dict(normalize_before=draw(st.booleans()))
    widths["d_model"] = draw(st.sampled_from([12, 24]))
    kind = dict(position_embedding_type=draw(st.sampled_from(["sine", "learned"])), num_channels=3)
    return heads | sizes | widths | kind | dict(backbone_config=draw(st.sampled_from(BACKBONES)))


def windows(draw):
    """A config of a Swin, whose stages are at least as large as a window; some pad their windows."""
    count, window = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    absolute = draw(st.booleans())  # position embeddings are of whole patches only
    last = draw(st.lists(st.integers(window, window + 3), min_size=2, max_size=2))  # sides of the last stage
    lacking = draw(st.integers(0, 2 ** (count - 1) - 1))
    sides = [2 * (side * 2 ** (count - 1) - lacking) for side in last]
    heads = [draw(st.integers(1, 3)) for _ in range(count)]
    return dict(
        depths=draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        num_heads=heads,
        embed_dim=math.lcm(*heads) * draw(st.integers(1, 2)),
        mlp_ratio=draw(st.sampled_from([1.0, 1.5, 3])),
        window_size=window,
        patch_size=2,
        image_size=[side - draw(st.integers(0, not absolute)) for side in sides],
        qkv_bias=draw(st.booleans()),
        use_absolute_embeddings=absolute,
    )


def mobile(draw, head):
    """A config of a network whose blocks have depthwise convolutions."""
    if head.config_class.model_type == "mobilenet_v2":
        return dict(
            depth_multiplier=draw(st.sampled_from([0.0625, 0.125])),
            expand_ratio=draw(st.sampled_from([1, 2])),
            output_stride=draw(st.sampled_from([8, 16, 32])),
            tf_padding=draw(st.booleans()),
            image_size=draw(st.sampled_from([32, (32, 48)])),
        )
    count = draw(st.integers(1, 3))

    def each(numbers):
        return draw(st.lists(numbers, min_size=count, max_size=count))

    widths = [32, *(4 * width for width in each(st.integers(1, 9)))]  # the stem writes 32 times the coefficient
    return dict(
        in_channels=widths[:-1],
        out_channels=widths[1:],
        kernel_sizes=each(st.sampled_from([3, 5])),
        strides=each(st.integers(1, 2)),
        expand_ratios=each(st.integers(1, 3)),
        num_block_repeats=each(st.integers(1, 2)),
        depthwise_padding=draw(st.lists(st.integers(0, 5), unique=True)),
        depth_coefficient=draw(st.sampled_from([1.0, 1.5])),
        pooling_type=draw(st.sampled_from(["mean", "max"])),
        image_size=draw(st.sampled_from([16, (16, 24)])),
    )


def mobilevit(draw):
    """A config of a MobileViT, some of whose streams run through several blocks, and whose patches may not fit."""
    heads = draw(st.integers(1, 3))
    return dict(
        neck_hidden_sizes=[draw(st.integers(1, 4)) for _ in range(7)],
        hidden_sizes=[heads * draw(st.integers(1, 3)) for _ in range(3)],
        num_attention_heads=heads,
        mlp_ratio=draw(st.sampled_from([1.0, 1.5])),
        expand_ratio=draw(st.sampled_from([1.0, 4.0])),
        conv_kernel_size=draw(st.sampled_from([1, 3])),
        output_stride=draw(st.sampled_from([8, 16, 32])),
        patch_size=draw(st.sampled_from([1, 2])),
        qkv_bias=draw(st.booleans()),
        image_size=draw(st.sampled_from([32, [32, 48]])),
    )


SIZES_OF_PARTS = ("layers", "ffn_dim")
BACKBONES = (
    dict(model_type="resnet", hidden_sizes=[8], depths=[1], embedding_size=8, out_features=["stage1"]),
    dict(model_type="convnext", hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, out_features=["stage1", "stage2"]),
    dict(model_type="dinov2", hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    | dict(out_features=["stage1"]),
)


@given(requests())
@settings(max_examples=settings.default.max_examples // 2)  # half a second each
def test_the_laws_hold_for_any_config(tmp_path_factory, request_):
    head, config, options, seed, share = request_
    model = tiny(head, seed, torch.float64, **config)
    gates, sizes = searched(model, seed, share, **options)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path_factory.mktemp("law") / "out")
    assert_same(*outputs, EXACT)
    assert options["layout"] == "per_layer" or is_stock(pruned)
    counted, scope = float(gates.count(gates.dense_sizes() | sizes)), options["resource_scope"]
    assert counted <= gates.attachment.config.target * gates.dense_resource
    written = float(gates.count(written_sizes(gates, sizes, pruned)))
    bound = gates.attachment.bound
    if options["resource"] == "params":
        parts = [pruned.get_submodule(path) for path in bound.stacks.values()] if scope == "layers" else [pruned]
        assert written == sum(parameter.numel() for part in parts for parameter in part.parameters())
    else:
        length = 1 if head in STACKED else bound.sizes.get("tokens", 7)
        found = macs_by_the_flop_counter(pruned, scope, batch_for(pruned, batch=1), length, bound.spec.stacks)
        assert written == pytest.approx(found, rel=1e-12)


# ---- what a stock config can express ----
def rounded(model, target, **options):
    attach_(model, DMSConfig(**({"target": target, "sequence_length": 7} | options)))
    search_(model)
    gates, bound = gates_of(model), gates_of(model).attachment.bound
    return gates, round_sizes(gates, bound, gates.attachment.config, model.config)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_a_stock_bert_has_heads_times_the_head_size_for_its_hidden_size(target):
    gates, sizes = rounded(tiny(BertForSequenceClassification), target)
    assert int(sizes["hidden"]) == int(sizes["pool"]) == 6 * int(sizes["heads"][0])
    assert gates.count(gates.dense_sizes() | sizes) <= target * gates.dense_resource
    heads = torch.minimum(sizes["heads"] + 1, torch.tensor(4))
    larger = {"heads": heads, "hidden": 6 * heads[:1], "pool": 6 * heads[:1]}
    assert gates.count(gates.dense_sizes() | sizes | larger) > target * gates.dense_resource


def test_dims_that_go_together_share_one_prune_ratio_and_choose_their_own_units():
    model = tiny(BertForSequenceClassification)
    gates, sizes = rounded(model, 0.5, prune=("heads", "hidden"))
    assert gates.prune_ratio.shape == (1,)
    assert [gates.ratio(name).tolist() for name in ("hidden", "pool")] == 2 * [gates.ratio("heads")[:1].tolist()]
    hard = gates.hard_sizes()
    assert int(hard["hidden"]) == int(hard["pool"]) == 6 * int(hard["heads"][0])
    kept = make_plan(gates, sizes).kept
    assert len(kept["hidden"][0]) == len(kept["pool"][0])
    assert not torch.equal(kept["hidden"][0], kept["pool"][0])


def test_dims_that_go_together_keep_each_others_multiples_and_protection():
    def sizes(**options):
        _, found = rounded(tiny(BertModel), 0.999, prune=("heads", "hidden"), **options)
        return int(found["heads"][0]), int(found["hidden"])

    assert sizes() == (3, 18)
    assert sizes(round_to={"hidden": 4}) == (2, 12)
    assert sizes(round_to={"heads": 2}) == (2, 12)
    assert sizes(protect={"max": {"hidden": 17}}) == (2, 12)
    assert sizes(protect={"min": {"hidden": 13}, "max": {"heads": 3}}) == (3, 18)
    with pytest.raises(
        ValueError, match=r"leave no size for heads and hidden: .* Loosen them, or use layout: per_layer"
    ):
        sizes(protect={"min": {"hidden": 13}, "max": {"hidden": 17}})
    attach_(tiny(BertModel), DMSConfig(target=0.9, layout="per_layer", prune=("hidden",), round_to={"hidden": 5}))


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("head", "heads", "hidden", "stock"),
    [
        (BertForMaskedLM, (3, 3, 3), 18, True),
        (BertForMaskedLM, (3, 3, 3), 20, False),
        (BertForMaskedLM, (3, 3, 4), 24, False),
        (ViTForImageClassification, (3, 3, 3), 20, True),
        (ViTForImageClassification, (3, 3, 2), 20, False),
        (Dinov2ForImageClassification, (3, 3, 3), 18, True),  # 72 is a multiple of it
        (Dinov2ForImageClassification, (3, 3, 3), 20, False),
        (Dinov2ForImageClassification, (3, 3, 2), 18, False),
    ],
)
def test_what_a_stock_config_can_express_is_written_as_stock(head, heads, hidden, stock, layout):
    model = tiny(head)
    bound = bind(spec_for(model.config), model)
    plan = Plan({"heads": tuple(torch.arange(count) for count in heads), "hidden": (torch.arange(hidden),)})
    if layout == "uniform" and not stock and len(set(heads)) == 1:
        with pytest.raises(ValueError, match=r"(Bert|Dinov2)Config cannot express the sizes .* Use layout: per_layer"):
            cut(model, bound, plan, layout)
        return
    pruned = cut(model, bound, plan, layout)
    assert is_stock(pruned) is stock
    assert outputs_of(pruned, batch_for(model)).isfinite().all()


def test_a_follower_has_gates_only_where_the_model_has_its_parameters():
    for cls, expected in ((BertModel, True), (BertForMaskedLM, False), (BertForTokenClassification, False)):
        model = tiny(cls)
        attach_(model, DMSConfig(target=0.5))
        assert ("pool" in gates_of(model).dims) is expected
    model = tiny(BertForSequenceClassification)
    attach_(model, DMSConfig(target=0.9, prune=("mlp",)))
    assert list(gates_of(model).dims) == ["mlp"]


@pytest.mark.parametrize(
    "head",
    [
        BertForSequenceClassification,
        ElectraForSequenceClassification,
        ViTForImageClassification,
        Dinov2ForImageClassification,
        BeitForImageClassification,
        *STAGED[1::2],
    ],
)
def test_importance_of_every_dim_follows_from_training(head):
    model = tiny(head)
    attach_(model, DMSConfig(target=0.5, layout="per_layer"))
    search_(model)
    gates = gates_of(model)
    for name in gates.dims:
        gates.raw_importance(name).zero_()
    model.train()(**batch_for(model), labels=torch.tensor([0, 1])).loss.backward()
    gates.update_importance_()
    for name in gates.dims:
        rows = (gates.raw_importance(name) > 0).any(-1)
        assert [row for row, found in enumerate(rows) if not found] == gates.attachment.bound.rows_without(name)
    gates.resource_loss().backward()
    assert gates.prune_ratio.grad[gates.lower < gates.upper].abs().min() > 0


@pytest.mark.parametrize("head", HEADS + RELATIVES + STACKED)
def test_open_gates_are_not_seen_and_taken_off_leave_the_model_as_it_was(head):
    model = tiny(head)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = outputs_of(model, batch_for(model))
    attach_(model, DMSConfig(target=0.99, warmup_steps=1, layout="per_layer" if head in PER_LAYER_ONLY else "uniform"))
    for module in model.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # it would see the batch
    assert relative_difference(outputs_of(model, batch_for(model)), before) < SHIPPED
    detach_(model)
    assert torch.equal(outputs_of(model.eval(), batch_for(model)), before)


@pytest.mark.parametrize("head", [BertForSequenceClassification, ViTForImageClassification])
def test_a_stock_model_can_be_pruned_again(head, tmp_path):
    model = tiny(head, num_attention_heads=6)
    searched(model, prune=DIMS[:3])
    again = prune(model, inputs=batch_for(model))
    _, sizes = searched(again, prune=DIMS[:3])
    *outputs, pruned = masked_cut_reloaded(again, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)
    assert pruned.num_parameters() < again.num_parameters() < model.num_parameters()


def test_costs_that_encoders_do_not_have_are_errors():
    with pytest.raises(ValueError, match=r"bert keeps no key-value cache. Use resource: params or macs"):
        attach_(tiny(BertModel), DMSConfig(target=0.5, resource="kv_bytes"))
    with pytest.raises(ValueError, match=r"resource macs needs dms.sequence_length"):
        attach_(tiny(BertModel), DMSConfig(target=0.5, resource="macs"))
    attach_(tiny(ViTModel), DMSConfig(target=0.5, resource="macs"))  # the image size decides
