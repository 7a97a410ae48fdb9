"""Each one-shot criterion equals its definition on numbers worked by hand, and leads to a cut within the budget."""

import itertools
import math

import pytest
import torch
from helpers.laws import batch_for, tiny
from helpers.marks import ordinary_if
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch
from transformers import BertForSequenceClassification, ResNetForImageClassification, ViTForImageClassification

from hf_dms import DMSConfig, HfDmsError, attach_, one_shot_obs_plan, prune
from hf_dms.archs.plain_view import submodule
from hf_dms.cut.prune import plan_of
from hf_dms.gating.attach import gates_of
from hf_dms.strategies.activations import _Moments, flap_metric, flap_scores, wanda_metric, wanda_sp_scores
from hf_dms.strategies.allocate import allocate_, sizes_of_scores
from hf_dms.strategies.block_influence import block_influence_scores
from hf_dms.strategies.gisp import gisp_scores
from hf_dms.strategies.kfac_obs import rising
from hf_dms.strategies.one_shot import CRITERIA, choose_
from hf_dms.strategies.taylor import element_scores, vector_scores
from hf_dms.strategies.weights import magnitude_scores

DIMS = {"layer": ("kv", "mlp"), "depth": ("layers",)}


def gated(prune=("kv", "mlp"), target=0.7, layout="per_layer", **options):
    model = tiny_llama()
    attach_(model, DMSConfig(target=target, layout=layout, prune=prune, **options))
    return model


def labelled(count=3):
    batches = [token_batch(seed=seed) for seed in range(count)]
    return [batch | {"labels": batch["input_ids"]} for batch in batches]


def dims_for(name):
    return [dim for kind in CRITERIA[name].dims for dim in DIMS.get(kind, ())]


# ---- definitions, by hand ----
def test_wanda_metric_by_hand():
    found = wanda_metric(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([2.0, 4.0]))
    assert found.tolist() == [8.0, 10.0]


def test_flap_metric_by_hand():
    """Products 1, 4 and 0: mean 5/3, standard deviation sqrt(13/3)."""
    found = flap_metric(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1.0, 1.0, 5.0]))
    expected = [(value - 5 / 3) / math.sqrt(13 / 3) for value in (1, 4, 0)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_moments_are_norm_and_variance_over_all_batches():
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    moments = _Moments(4)
    moments(torch.nn.Identity(), (rows[None, :2],))
    moments(torch.nn.Identity(), (rows[None, 2:],))
    assert torch.allclose(moments.norm(), rows.double().norm(dim=0))
    assert torch.allclose(moments.variance(), rows.double().var(0))


def inputs_of(model, path, batches):
    seen = []
    handle = submodule(model, path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


def test_activation_criteria_look_at_the_dense_model_s_inputs_of_the_maps_that_read_a_unit():
    model, batches = gated(), [token_batch(seed=seed) for seed in range(2)]
    x = inputs_of(tiny_llama(), "model.layers.1.self_attn.o_proj", batches)
    weight = submodule(model, "model.layers.1.self_attn.o_proj").weight.detach().double()
    wanda = (weight.abs().sum(0) * x.norm(dim=0)).view(3, 8).sum(1)  # 3 KV groups of 2 heads of 4
    assert torch.allclose(wanda_sp_scores(model, batches)["kv"][1], wanda)
    metric = x.var(0) * weight.square().sum(0)
    flap = ((metric - metric.mean()) / metric.std()).view(3, 8).mean(1)
    assert torch.allclose(flap_scores(model, batches)["kv"][1], flap)


def test_vector_taylor_is_the_square_of_the_loss_s_slope_in_a_unit_s_mask():
    """Finite differences: one MLP channel's column of down_proj is scaled by 1 ± h. The norms compute in float32."""
    model, batch = gated(prune=("mlp",)).double(), labelled(1)[0]
    unit = int(vector_scores(model, [batch])["mlp"][2].argmax())
    found = vector_scores(model, [batch])["mlp"][2, unit]
    dense, step = tiny_llama().double(), 1e-2
    weight = dense.model.layers[2].mlp.down_proj.weight
    whole = weight[:, unit].detach().clone()
    losses = []
    with torch.no_grad():
        for scale in (1 + step, 1 - step):
            weight[:, unit] = whole * scale
            losses.append(float(dense(**batch).loss))
    assert float(found) == pytest.approx(((losses[0] - losses[1]) / (2 * step)) ** 2, rel=1e-2)


def test_element_taylor_is_the_sum_of_weight_times_gradient_over_all_weights_of_a_unit():
    batch = labelled(1)[0]
    dense = tiny_llama()
    dense(**batch).loss.backward()
    mlp = dense.model.layers[0].mlp
    expected = sum((p * p.grad).abs()[4].sum() for p in (mlp.gate_proj.weight, mlp.up_proj.weight))
    expected += (mlp.down_proj.weight * mlp.down_proj.weight.grad).abs()[:, 4].sum()
    assert float(element_scores(gated(), [batch])["mlp"][0, 4]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_block_influence_is_one_minus_the_cosine_of_a_layer_s_input_and_output():
    model, batches = gated(prune=("layers",)), [token_batch()]
    with torch.no_grad():
        hidden = tiny_llama()(**batches[0], output_hidden_states=True).hidden_states  # the last is normalised
    expected = 1 - torch.cosine_similarity(hidden[0].double(), hidden[1].double(), dim=-1).mean()
    assert float(block_influence_scores(model, batches)["layers"][0, 0]) == pytest.approx(
        float(expected.detach()), rel=1e-6
    )


def test_block_influence_of_images_counts_patches():
    model = tiny(ViTForImageClassification)
    batch = batch_for(model)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    expected = 1 - torch.cosine_similarity(hidden[0].double(), hidden[1].double(), dim=-1).mean()
    attach_(model, DMSConfig(target=0.9, prune=("layers",)))
    assert float(block_influence_scores(model, [batch])["layers"][0, 0]) == pytest.approx(float(expected), rel=1e-6)


def test_kfac_obs_chooses_what_the_plan_of_one_shot_obs_chooses():
    config = DMSConfig(target=0.7, layout="per_layer", prune=("kv", "mlp"))
    expected = one_shot_obs_plan(tiny_llama(), config, labelled())
    model = gated()
    choose_(model, "kfac_obs", labelled())
    found = plan_of(model)
    assert found.sizes == expected.sizes
    for name, rows in expected.kept.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, found.kept[name]))


def test_costs_that_do_not_rise_are_raised_by_one_step_of_float32():
    found = rising(torch.tensor([0.0, 1.0, 5.0, 4.0, 5.0, 6.0, math.inf]))
    assert found.diff().min() > 0
    assert found.tolist() == pytest.approx([0.0, 1.0, 5.0, 5.0, 5.0, 6.0, math.inf])


def test_iterative_taylor_scores_what_is_left_anew_and_its_cuts_are_nested():
    model, batches = gated(prune=("mlp",), target=0.6, resource_scope="layers"), labelled(2)
    first = element_scores(gated(prune=("mlp",)), batches[:1])["mlp"]
    scores = gisp_scores(model, batches)["mlp"]
    halfway = gates_of(gated(prune=("mlp",), target=0.6**0.5, resource_scope="layers"))
    sizes = sizes_of_scores(halfway, {"mlp": first})
    gone = torch.ones_like(scores)
    for row, units in enumerate(sizes["mlp"]):
        gone[row, first[row].argsort(descending=True)[: int(units)]] = 0
    assert halfway.resource(halfway.dense_sizes() | sizes) == pytest.approx(0.6**0.5, abs=0.02)
    assert gone.sum() > 10
    assert torch.equal(scores == 0, gone == 1)
    assert gates_of(model).schedule.target == 0.6
    assert gates_of(model).rounded is None


def test_iterative_taylor_in_one_step_is_the_one_shot_criterion():
    batch = labelled(1)
    assert torch.equal(gisp_scores(gated(), batch)["mlp"], element_scores(gated(), batch)["mlp"])


# ---- allocation ----
def test_a_global_threshold_drops_the_least_worthy_units_of_all_layers():
    model = gated(prune=("mlp",), target=0.75, resource_scope="layers")
    gates = gates_of(model)
    scores = torch.arange(60.0).view(3, 20)  # layer 0 has the lowest scores
    allocate_(gates, {"mlp": scores}, "global")
    units = plan_of(model).sizes["mlp"]
    assert units[2] == 20
    assert units[0] == 1
    assert units[0] < units[1]


def test_dims_that_follow_one_that_follows_another_get_its_share():
    """In BERT's stock format the pooler follows the residual stream, and that follows the heads."""
    model = tiny(BertForSequenceClassification)
    gates = attach_(model, DMSConfig(target=0.6, layout="uniform")) or gates_of(model)
    chained = [name for name, dim in gates.dims.items() if dim.follows and gates.dims[dim.follows].follows]
    assert chained
    allocate_(gates, {name: torch.rand(dim.rows, dim.units) for name, dim in gates.dims.items()})
    prune(model)


def test_equal_allocation_gives_every_layer_the_same_share():
    model = gated(prune=("mlp",), target=0.8, resource_scope="layers")
    allocate_(gates_of(model), {"mlp": torch.rand(3, 20)}, "equal")
    units = plan_of(model).sizes["mlp"]
    assert max(units) - min(units) <= 1


# ---- every criterion ----
LAYOUTS = ("uniform", "per_layer")


@pytest.mark.parametrize(
    ("name", "layout"),
    ordinary_if(
        lambda name, layout: list(CRITERIA).index(name) % 2 == LAYOUTS.index(layout),
        itertools.product(CRITERIA, LAYOUTS),
    ),
)
def test_every_criterion_leads_to_a_cut_that_keeps_the_budget(name, layout):
    model = gated(dims_for(name), target=0.75, layout=layout)
    dense = tiny_llama()
    choose_(model, name, labelled())
    pruned = prune(model)
    kept = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in dense.parameters())
    assert kept <= 0.75
    assert not model.training
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if "dms_gates" not in n)
    for (path, expected), found in zip(dense.named_parameters(), (p for n, p in model.named_parameters())):
        assert torch.equal(found, expected) or CRITERIA[name].changes_weights, path


OF_LAYERS = [name for name, criterion in CRITERIA.items() if "layer" in criterion.dims]
ENCODERS = {
    "BertForSequenceClassification": ("heads", "mlp"),
    "ConvNextForImageClassification": ("mlp",),
    "ViTForImageClassification": ("heads", "mlp"),
    "ResNetForImageClassification": ("reduced", "mid"),
    "RegNetForImageClassification": ("groups", "squeeze"),
    "SwinForImageClassification": ("heads", "mlp"),
    "MobileViTForImageClassification": ("heads", "mlp"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    ordinary_if(
        lambda name, kind: (OF_LAYERS.index(name) + list(ENCODERS).index(kind)) % 2 == 0,
        itertools.product(OF_LAYERS, ENCODERS),
    ),
)
def test_criteria_serve_encoders_of_text_and_images(name, kind):
    import transformers

    dims, model = ENCODERS[kind], tiny(getattr(transformers, kind))
    batch = batch_for(model)
    labels = torch.zeros(len(next(iter(batch.values()))), dtype=torch.long)
    attach_(model, DMSConfig(target=0.9, layout="per_layer", prune=dims))
    if name == "kfac_obs" and kind.startswith(("ConvNext", "ResNet", "RegNet", "Swin", "MobileViT")):
        with pytest.raises(HfDmsError, match="has several stacks of layers"):
            choose_(model, name, 4 * [batch | {"labels": labels}])
        return
    choose_(model, name, 4 * [batch | {"labels": labels}])
    assert sum(p.numel() for p in prune(model).parameters()) < sum(p.numel() for p in model.parameters())


def test_activation_criteria_look_at_a_convolution_s_inputs_at_every_position():
    model = tiny(ResNetForImageClassification)
    seen, path = [], "resnet.encoder.stages.1.layers.1.layer.1.convolution"
    hook = submodule(model, path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**batch_for(model))
    hook.remove()
    x, weight = seen[0].double(), submodule(model, path).weight.detach().double()
    attach_(model, DMSConfig(target=0.9, layout="per_layer", prune=("reduced",)))
    norm = torch.stack([x[:, unit].norm() for unit in range(x.shape[1])])
    expected = torch.stack([weight[:, unit].abs().sum() for unit in range(x.shape[1])]) * norm
    assert torch.allclose(wanda_sp_scores(model, [batch_for(model)])["reduced1"][1], expected)


def test_after_a_choice_the_masked_model_is_the_cut_one():
    model = gated()
    choose_(model, "taylor", labelled())
    pruned = prune(model)
    gates = gates_of(model)
    gates.rounded = {name: torch.tensor(units) for name, units in plan_of(model).sizes.items()}
    assert relative_difference(pruned(**token_batch()).logits, model(**token_batch()).logits) < 1e-5


@pytest.mark.parametrize("name", ["taylor_elements", "dms_plain"])
def test_a_choice_does_not_depend_on_what_the_gates_went_through_before(name):
    fresh, used = gated(), gated()
    choose_(used, "magnitude")
    search_(used)
    gates_of(used).decide_(0.9)
    for model in (fresh, used):
        choose_(model, name, labelled(12))
    assert not gates_of(used).decided
    assert torch.equal(gates_of(used).prune_ratio, gates_of(fresh).prune_ratio)
    for dim in ("kv", "mlp"):
        assert torch.equal(gates_of(used).raw_importance(dim), gates_of(fresh).raw_importance(dim))


# ---- mistakes ----
@pytest.mark.parametrize(
    ("name", "prune_dims", "message"),
    [
        ("tailor", ("mlp",), "There is no criterion 'tailor'. Did you mean taylor[?] Criteria are block_influence"),
        ("flap", ("mlp", "layers"), "flap is not defined for layers. Prune mlp alone"),
        ("block_influence", ("mlp",), "block_influence is not defined for mlp. Prune other dims"),
        ("taylor", ("mlp",), "taylor needs batches"),
        ("kfac_obs", ("mlp", "layers"), "kfac_obs is not defined for layers. Prune mlp alone"),
    ],
)
def test_mistakes_say_what_to_do(name, prune_dims, message):
    model = gated(prune_dims)
    with pytest.raises(HfDmsError, match=message):
        choose_(model, name)


@pytest.mark.parametrize("name", ["taylor", "taylor_elements", "pas", "one_shot", "zero_shot"])
def test_batches_without_labels_are_an_error_where_a_loss_is_needed(name):
    message = "criterion needs batches with labels, .* These have input_ids, attention_mask."
    with pytest.raises(HfDmsError, match=message):
        choose_(gated(), name, [token_batch(seed=seed) for seed in range(8)])


def test_magnitude_is_the_sum_of_squares_of_a_unit_s_weights():
    model = gated()
    mlp = model.model.layers[1].mlp
    expected = mlp.gate_proj.weight[3].square().sum() + mlp.up_proj.weight[3].square().sum()
    expected += mlp.down_proj.weight[:, 3].square().sum()
    assert float(magnitude_scores(model, ())["mlp"][1, 3]) == pytest.approx(float(expected.detach()), rel=1e-6)
