"""Dims one after the other on an axis, `"out (a + b)"`: hand-worked numbers, and a toy that obeys the laws."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.laws import EXACT, assert_same, macs_by_the_flop_counter, masked_cut_reloaded, searched
from helpers.tiny import relative_difference, search_, token_batch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput

from hf_dms import DMSConfig, attach_, choose_, detach_, prune, register_arch
from hf_dms.archs.axes import flat, parse_axes, products, terms
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import ARCHS, spec_for
from hf_dms.archs.spec import ArchSpec, Dim, check_spec
from hf_dms.cut.plan import Plan
from hf_dms.cut.prune import sum_over_units
from hf_dms.cut.slicing import axis_indices, slice_tensor
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import gates_of
from hf_dms.gating.hooks import _masked_batch_norm_forward
from hf_dms.gating.places import masked_inputs, norm_spans
from hf_dms.gating.rounding import rounded_of
from hf_dms.gating.scales import folded_scales
from hf_dms.masked_ops import Span


# ---- a toy: a block that reads attention and MLP side by side, as some fast transformers have ----
class SideConfig(PreTrainedConfig):
    model_type = "side_toy"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "num_blocks"}
    vocab_size: int = 33
    width: int = 12
    beside: int = 5
    num_heads: int = 3
    head_dim: int = 4
    inner: int = 7
    num_blocks: int = 2


class SideBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        attention = config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(config.width)
        self.into = nn.Linear(config.width, 3 * attention + config.inner)
        self.out = nn.Linear(attention + config.inner, config.width)
        self.both_signs = nn.Linear(2 * config.inner, config.width)

    def forward(self, hidden_states):
        batch, length, _ = hidden_states.shape
        size = self.num_heads * self.head_dim
        qkv, inner = self.into(self.norm(hidden_states)).tensor_split([3 * size], dim=-1)
        qkv = qkv.view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ value
        hidden_states = hidden_states + self.out(torch.cat((attention.transpose(1, 2).flatten(2), inner.tanh()), -1))
        return hidden_states + self.both_signs(torch.cat((inner.relu(), (-inner).relu()), -1))


class SideModel(PreTrainedModel):
    config_class = SideConfig
    base_model_prefix = "side"

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.more = nn.Embedding(config.vocab_size, config.beside)
        self.blocks = nn.ModuleList(SideBlock(config) for _ in range(config.num_blocks))
        self.last_norm = nn.LayerNorm(config.width + config.beside)
        self.last = nn.Linear(config.width + config.beside, 6)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden_states = self.tokens(input_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        both = torch.cat((hidden_states, self.more(input_ids)), -1)
        return BaseModelOutput(last_hidden_state=self.last(self.last_norm(both)))


class SideForTokenClassification(PreTrainedModel):
    config_class = SideConfig
    base_model_prefix = "side"

    def __init__(self, config):
        super().__init__(config)
        self.side = SideModel(config)
        self.classifier = nn.Linear(6, config.num_labels)
        self.post_init()

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.classifier(self.side(input_ids).last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 3)
        return TokenClassifierOutput(loss=loss, logits=logits)


SIDE = ArchSpec(
    model_type="side_toy",
    layers="blocks",
    dims=(
        Dim("heads", "num_heads", scope="layer"),
        Dim("mlp", "inner", scope="layer"),
        Dim("hidden", "width", scope="model"),
        Dim("beside", "beside", scope="model"),
        Dim("layers", "num_blocks", scope="depth"),
        Dim("d", "head_dim"),
        Dim("qkv", "3"),
        Dim("six", "6"),
        Dim("vocab", "vocab_size"),
        Dim("label", "num_labels"),
    ),
    params={
        "tokens.weight": "vocab hidden",
        "more.weight": "vocab beside",
        "blocks.{i}.norm.weight": "hidden",
        "blocks.{i}.norm.bias": "hidden",
        "blocks.{i}.into.weight": "(qkv heads d + mlp) hidden",
        "blocks.{i}.into.bias": "(qkv heads d + mlp)",
        "blocks.{i}.out.weight": "hidden (heads d + mlp)",
        "blocks.{i}.out.bias": "hidden",
        "blocks.{i}.both_signs.weight": "hidden (mlp + mlp)",
        "blocks.{i}.both_signs.bias": "hidden",
        "last_norm.weight": "(hidden + beside)",
        "last_norm.bias": "(hidden + beside)",
        "last.weight": "six (hidden + beside)",
        "last.bias": "six",
    },
    heads={"ForTokenClassification": {"classifier.weight": "label six", "classifier.bias": "label"}},
    config={
        **{"num_heads": "heads", "head_dim": "d", "inner": "mlp", "width": "hidden", "beside": "beside"},
        "num_blocks": "layers",
    },
    attributes={"blocks.{i}.num_heads": "heads"},
    attention="heads d",
    outputs={"last_hidden_state": "six"},
)
DIMS = ("heads", "mlp", "hidden", "beside", "layers")


@pytest.fixture(scope="module", autouse=True)
def registered():
    AutoConfig.register("side_toy", SideConfig)
    AutoModel.register(SideConfig, SideModel)
    AutoModelForTokenClassification.register(SideConfig, SideForTokenClassification)
    register_arch(SIDE)
    yield
    del ARCHS["side_toy"]


def toy(seed=0, dtype=torch.float64):
    model = SideForTokenClassification(SideConfig(num_labels=3)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.5, generator=generator)
    return model.to(dtype)


def bound_toy():
    model = toy()
    return bind(spec_for(model.config), model)


# ---- by hand ----
def test_products_that_follow_each_other_are_the_terms_of_an_axis():
    (out, axis) = parse_axes("out (a + two b + a)")
    assert terms(out) == (("out",),)
    assert terms(axis) == (("a",), ("two", "b"), ("a",))
    assert terms(()) == ((),)
    assert flat((out, axis)) == ("out", "a", "two", "b", "a")
    assert products((out, axis)) == (("out", "a"), ("out", "two", "b"), ("out", "a"))
    assert products(parse_axes("(a + b) (a + c)")) == (("a", "a"), ("a", "c"), ("b", "a"), ("b", "c"))
    assert products(()) == ((),)


def test_kept_positions_of_a_term_lie_behind_those_of_the_term_before():
    bound = bound_toy()
    kept = {"heads": (torch.tensor([0, 2]), torch.tensor([1])), "mlp": (torch.tensor([1, 6]), torch.tensor([0]))}
    plan = Plan(kept)
    (axis,) = parse_axes("(heads d + mlp)")  # 12 positions of 3 heads, then 7 channels
    assert axis_indices(axis, bound, 0, plan).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 13, 18]
    assert axis_indices(axis, bound, 1, plan).tolist() == [4, 5, 6, 7, 12]
    (axis,) = parse_axes("(mlp + mlp)")
    assert axis_indices(axis, bound, 0, plan).tolist() == [1, 6, 8, 13]
    assert bound.product("mlp + heads d") == 19
    weight = torch.arange(12.0 * 19).view(12, 19)
    cut = slice_tensor(weight, bound, "side.blocks.0.out.weight", plan)
    assert torch.equal(cut, weight[:, [0, 1, 2, 3, 8, 9, 10, 11, 13, 18]])


def test_the_cost_of_a_sum_is_the_sum_of_the_costs():
    """Per layer: into 12·(9h·4/3 + m) and its bias, out 12·(4h + m), both_signs 12·2m, biases and norm 4·12."""
    model = toy()
    attach_(model, DMSConfig(target=0.99, prune=("heads", "mlp"), layout="per_layer", resource_scope="layers"))
    gates = gates_of(model)
    assert set(gates.cost.stacks["layers"]) == {
        ("heads",),
        ("mlp",),
        ("hidden",),
        ("heads", "hidden"),
        ("hidden", "mlp"),
    }
    sizes = {"heads": torch.tensor([2, 1]), "mlp": torch.tensor([5, 3])}

    def by_hand(heads, mlp):
        return 13 * (12 * heads + mlp) + 12 * (4 * heads + mlp) + 12 * 2 * mlp + 4 * 12

    assert float(gates.count(gates.dense_sizes() | sizes)) == by_hand(2, 5) + by_hand(1, 3)


def test_channels_that_others_stand_beside_are_no_groups():
    """A unit of a group is several channels, as a head is: such dims are rounded first, and channels take the rest."""
    model = toy()
    attach_(model, DMSConfig(target=0.95, prune=("heads", "mlp"), layout="per_layer"))
    assert rounded_of(gates_of(model)).coarse == ("heads",)


def test_importance_of_a_unit_is_summed_over_all_of_its_places():
    model = toy()
    attach_(model, DMSConfig(target=0.99, prune=("heads", "mlp"), layout="per_layer"))
    gates = gates_of(model)
    bound = gates.attachment.bound
    values = {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}
    found = sum_over_units(bound, gates, lambda name: values[name])
    layer = "side.blocks.1."
    into, out, both = (values[f"{layer}{name}.weight"] for name in ("into", "out", "both_signs"))
    bias = values[f"{layer}into.bias"]
    for unit in range(7):
        expected = into[36 + unit].sum() + bias[36 + unit] + out[:, 12 + unit].sum()
        expected = expected + both[:, unit].sum() + both[:, 7 + unit].sum()
        assert torch.isclose(found["mlp"][1, unit], expected)
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        expected = (
            into[:36].view(3, 3, 4, 12)[:, head].sum() + bias[:36].view(3, 3, 4)[:, head].sum() + out[:, own].sum()
        )
        assert torch.isclose(found["heads"][1, head], expected)


def test_places_of_masks_are_those_of_the_terms():
    bound = bound_toy()
    out, both = "side.blocks.1.out", "side.blocks.1.both_signs"
    assert [each for each in masked_inputs(bound, "heads") if each[1] == 1] == [(out, 1, Span(1, 3, 4, 0, 7))]
    assert [each for each in masked_inputs(bound, "mlp") if each[1] == 1] == [
        *[(out, 1, Span(1, 7, 1, 12, 0)), (both, 1, Span(1, 7, 1, 0, 7)), (both, 1, Span(1, 7, 1, 7, 0))]
    ]
    assert norm_spans(bound, "side.last_norm", "beside") == [Span(1, 5, 1, 12, 0)]


def test_scales_are_folded_into_the_columns_of_their_own_term():
    bound = bound_toy()
    scales = {"heads": torch.rand(2, 3), "mlp": torch.rand(2, 7), "norms.beside": torch.rand(1, 5)}
    factors = folded_scales(scales, bound)
    heads, mlp = scales["heads"][1].exp().repeat_interleave(4), scales["mlp"][1].exp()
    assert torch.allclose(factors["side.blocks.1.out.weight"], torch.cat((heads, mlp))[None])
    assert torch.allclose(factors["side.blocks.1.both_signs.weight"], torch.cat((mlp, mlp))[None])
    assert torch.allclose(factors["side.last_norm.bias"], torch.cat((torch.ones(12), scales["norms.beside"][0].exp())))


def test_a_batch_norm_takes_the_masks_of_all_dims_on_its_axis():
    norm = nn.BatchNorm2d(5).eval()
    masks = {"a": (torch.tensor([0.5, 0.25]),), "b": (torch.tensor([1.0, 0.125, 0.5]),)}
    gates = SimpleNamespace(log_masks={name: (rows[0].log(),) for name, rows in masks.items()})
    parts = [("a", 0, Span(1, 2, 1, 0, 3)), ("b", 0, Span(1, 3, 1, 2, 0))]
    x = torch.randn(2, 5, 3, 3)
    expected = norm(x) * torch.cat((masks["a"][0], masks["b"][0])).view(5, 1, 1)
    assert torch.allclose(_masked_batch_norm_forward(norm, gates, parts, x), expected)


# ---- the laws ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("dims", [*[(dim,) for dim in DIMS], ("hidden", "beside"), DIMS], ids="-".join)
def test_masked_equals_cut_equals_reloaded(dims, layout, tmp_path):
    model = toy()
    _, sizes = searched(model, prune=dims, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("resource", ["params", "macs"])
def test_counted_equals_real(resource):
    model = toy()
    gates, sizes = searched(model, layout="per_layer", resource=resource)
    pruned = prune(model, inputs=token_batch(2, 7))
    counted = float(gates.count(gates.dense_sizes() | sizes))
    if resource == "params":
        assert counted == pruned.num_parameters()
    else:
        assert counted == pytest.approx(macs_by_the_flop_counter(pruned, "model", token_batch(1, 7), 7), rel=1e-12)


def test_soft_masks_are_those_of_the_formula_and_so_is_the_importance():
    """With the same masks on the parts before they are put side by side, outputs and gradients are the same."""
    batch = token_batch(2, 7) | {"labels": torch.arange(14).view(2, 7)}
    model = toy()
    attach_(model, DMSConfig(target=0.5, prune=("heads", "mlp"), layout="per_layer"))
    search_(model)
    gates = gates_of(model)
    model.train()
    loss = model(**batch).loss
    masks = {name: torch.stack([row.detach() for row in gates.log_masks[name]]).double() for name in gates.dims}
    loss.backward()
    taylor = {name: gates._taylor[name].clone() for name in gates.dims}

    plain = toy()
    for rows in masks.values():
        rows.requires_grad_()

    def masked_out(number, module, args):
        heads = masks["heads"][number].exp().repeat_interleave(4)
        return (args[0] * torch.cat((heads, masks["mlp"][number].exp())),)

    def masked_both(number, module, args):
        return (args[0] * masks["mlp"][number].exp().repeat(2),)

    for number, block in enumerate(plain.side.blocks):
        block.out.register_forward_pre_hook(functools.partial(masked_out, number))
        block.both_signs.register_forward_pre_hook(functools.partial(masked_both, number))
    expected = plain(**batch).loss
    expected.backward()
    assert relative_difference(loss, expected) < 1e-6  # masks are float32
    for name, rows in masks.items():
        assert relative_difference(taylor[name].double(), rows.grad) < 1e-5, name


def test_open_gates_are_not_seen_and_taken_off_leave_the_model_as_it_was():
    model = toy(dtype=torch.float32)
    before = outputs_of(model, token_batch(2, 7))
    attach_(model, DMSConfig(target=0.9, warmup_steps=1, layout="per_layer"))
    assert relative_difference(outputs_of(model.train(), token_batch(2, 7)), before) < 1e-5
    detach_(model)
    assert torch.equal(outputs_of(model.eval(), token_batch(2, 7)), before)


# ---- what does not work ----
@pytest.mark.parametrize("text", ["a + b", "out (a +)", "out (+ b)", "out (a + (b c))", "out (a ++ b)", "out (a+b)"])
def test_a_sum_that_is_not_written_as_one_is_an_error(text):
    dims = (*SIDE.dims, *(Dim(name, "2") for name in ("a", "b", "c", "out")))
    message = r"side_toy: the entry 'last.weight' (is '.*', expected a list of axes, .* 'out \(a \+ b\)'|names )"
    with pytest.raises(ValueError, match=message):
        check_spec(replace(SIDE, dims=dims, params=SIDE.params | {"last.weight": text}))


def test_a_sum_of_other_sizes_is_an_error_with_both_shapes():
    wrong = replace(SIDE, params=SIDE.params | {"last.weight": "six (hidden + hidden)"})
    with pytest.raises(
        ValueError, match=r"shape \(6, 17\), but its description 'six \(hidden \+ hidden\)' means \(6, 24\)"
    ):
        bind(wrong, toy())


def test_a_sum_outside_of_a_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"the entry 'inner' names '\+', which is none of the dims"):
        check_spec(replace(SIDE, config=SIDE.config | {"inner": "mlp + mlp"}))


def test_padding_puts_no_zeros_between_units():
    message = (
        "layout padded: the zeros stand at the end of an axis, and a parameter of side_toy has other units behind "
        r"those of heads, or in front. Prune others only, as prune: \[layers\], or use layout: per_layer"
    )
    with pytest.raises(ValueError, match=message):
        attach_(toy(), DMSConfig(target=0.9, prune=("heads", "mlp", "layers"), layout="padded"))
    attach_(toy(), DMSConfig(target=0.9, prune=("layers",), layout="padded"))


def test_least_squares_choose_no_units_that_others_stand_beside():
    model = toy(dtype=torch.float32)
    attach_(model, DMSConfig(target=0.9, prune=("mlp",), layout="per_layer"))
    batch = token_batch(2, 7) | {"labels": torch.arange(14).view(2, 7)}
    message = (
        "Least squares cannot choose units of 'mlp' of a side_toy: side.blocks.0.out reads other units beside them"
    )
    with pytest.raises(ValueError, match=message):
        choose_(model, "kfac_obs", 4 * [batch])
