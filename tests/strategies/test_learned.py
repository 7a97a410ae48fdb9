"""Learned strategies: definitions worked by hand, masks at the search's places, and what a known loss teaches them."""

import math

import pytest
import torch
from helpers.tiny import relative_difference, tiny_llama, token_batch

from hf_dms import DMSConfig, attach_, prune
from hf_dms.cut.prune import plan_of
from hf_dms.gating.attach import gates_of
from hf_dms.strategies.hard_concrete import HardConcrete, hard_concrete, open_probability
from hf_dms.strategies.learned import kept_resource, masked_by, train_masks, units
from hf_dms.strategies.one_shot import CRITERIA, choose_
from hf_dms.strategies.projected import TAU, Projected
from hf_dms.strategies.scaled import fold_, soft_count
from hf_dms.strategies.selection import ElementSelection, NumberSelection, PaS, hard_gumbel
from hf_dms.strategies.topk_variants import KINDS, VARIANTS, TopK, estimated_topk, minmax

LEARNED = ("element_selection", "hard_concrete", "number_selection", "pas", "projected", "scaled", *VARIANTS)


def gated(prune=("kv", "mlp"), target=0.7, **options):
    model = tiny_llama()
    attach_(model, DMSConfig(target=target, layout="per_layer", resource_scope="layers", prune=prune, **options))
    return model


def labelled(count):
    batches = [token_batch(seed=seed) for seed in range(count)]
    return [batch | {"labels": batch["input_ids"]} for batch in batches]


# ---- definitions, by hand ----
def test_hard_concrete_by_hand():
    """At u = 1/2, s = σ(log α / β); log α = β gives s = 1/(1 + 1/e), z = 1.2·s − 0.1."""
    s = 1 / (1 + math.exp(-1))
    found = hard_concrete(torch.tensor([2 / 3, 0.0, 0.0]), torch.tensor([0.5, 0.01, 0.99]))
    assert found.tolist() == pytest.approx([1.2 * s - 0.1, 0.0, 1.0])


def test_how_often_a_hard_concrete_gate_opens_is_what_samples_say():
    log_alpha = torch.tensor([-1.0, 0.0, 1.0])
    u = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    assert torch.allclose((hard_concrete(log_alpha, u) > 0).float().mean(0), open_probability(log_alpha), atol=0.01)
    assert float(open_probability(log_alpha)[1]) == pytest.approx(1 / (1 + 11 ** (-2 / 3)))


def test_hard_gumbel_is_one_where_the_noisy_logit_is_positive_and_has_the_soft_one_s_gradient():
    logit = torch.tensor([0.0, 0.0, 2.0, -2.0], requires_grad=True)
    u = torch.tensor([0.4, 0.6, 0.2, 0.5])  # logistic noise −0.405, 0.405, −1.386, 0
    mask = hard_gumbel(logit, u)
    assert mask.tolist() == [0.0, 1.0, 1.0, 0.0]
    mask[0].backward()
    soft = 1 / (1 + math.exp(math.log(1.5) / 0.1))
    assert float(logit.grad[0]) == pytest.approx(soft * (1 - soft) / 0.1, rel=1e-4)


def test_soft_count_by_hand():
    assert soft_count(torch.tensor([0.0, 0.5, -0.5, 1.0]), 0.5).tolist() == pytest.approx([0.0, 0.5, 0.5, 0.8])


def test_estimated_topk_is_hard_and_every_unit_passes_its_gradient_to_the_ratio():
    ratio = torch.tensor([0.5], requires_grad=True)
    mask = estimated_topk(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), ratio)
    assert mask.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    (mask * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert ratio.grad.tolist() == [-1111.0]


def test_kinds_of_importance_by_hand():
    mask, gradient = torch.tensor([0.5, 1.0]), torch.tensor([-4.0, 3.0])
    found = {name: kind(mask, gradient).tolist() for name, kind in KINDS.items()}
    assert found == {"taylor": [4.0, 9.0], "absolute": [2.0, 3.0], "gradient": [16.0, 9.0]}


def test_minmax_scales_a_row_to_its_smallest_and_largest_importance():
    assert minmax(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])).tolist() == [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


def test_the_plain_variant_is_the_search_step_by_step():
    """At every step, masks, resource loss, gradient of the ratios and importance equal those of the gates."""
    options = {"target_ramp": 0.5, "warmup_steps": 1, "sharpness": 2.0}
    model, other, batch = gated(**options), gated(**options), labelled(1)[0]
    gates, relaxation = gates_of(model), TopK(gates_of(other))
    optimizers = [torch.optim.Adam([leaf], lr=relaxation.rate) for leaf in (gates.prune_ratio, relaxation.ratio)]
    for step in range(4):
        model.train()
        loss = model(**batch).loss + gates.resource_loss(step / 4)
        with masked_by(other.eval()) as masks:
            masks.update(relaxation.masks(step / 4))
            same = other(**batch).loss + relaxation.penalty(step / 4)
        assert float(same.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        for optimizer, each in zip(optimizers, (loss, same)):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
        gates.update_importance_()
        for name in gates.dims:
            assert relative_difference(gates_of(other).raw_importance(name), gates.raw_importance(name)) < 1e-4
    assert torch.allclose(relaxation.ratio, gates.prune_ratio, atol=1e-5)
    assert float(gates.prune_ratio.detach().max()) > 0.01


def test_the_scores_of_a_top_k_are_above_zero_for_the_units_that_its_ratio_keeps():
    gates = gates_of(gated(prune=("mlp",)))
    gates.raw_importance("mlp").copy_(torch.rand(3, 20, generator=torch.Generator().manual_seed(0)))
    relaxation = TopK(gates)
    relaxation.ratio.data = torch.tensor([0.1, 0.5, 0.75])
    assert (relaxation.scores()["mlp"] > 0).sum(-1).tolist() == [18, 10, 5]


def test_number_selection_mixes_nested_masks():
    gates = gates_of(gated(prune=("mlp",)))
    importance = torch.arange(20.0).expand(3, 20)
    selection = NumberSelection(gates, {"mlp": importance})
    shares = torch.zeros(3, 16)
    shares[:, -1], shares[:, 0] = 0.25, 0.75  # a quarter for all 20 units, three quarters for the best one
    mixed = selection.mixed({"mlp": shares})["mlp"]
    assert mixed[0].tolist() == pytest.approx([0.25] * 19 + [1.0])
    assert mixed.sum(-1).tolist() == pytest.approx([0.25 * 20 + 0.75 * 1] * 3)


def test_projected_masks_are_hard_keep_the_budget_at_every_step_and_carry_the_soft_gradient():
    torch.manual_seed(0)
    gates = gates_of(gated())
    relaxation = Projected(gates)
    for _ in range(2):
        masks = relaxation.masks(0.0)
        assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks.values())
        assert 0.6 < float(kept_resource(gates, masks).detach()) <= 0.7
        for score in relaxation.learned.values():
            score.data += torch.randn_like(score)
    relaxation.masks(0.0)["mlp"].sum().backward()
    p = torch.sigmoid(relaxation.learned["mlp"].detach() / TAU)
    assert torch.allclose(relaxation.learned["mlp"].grad, p * (1 - p) / TAU)


def test_pas_keeps_weights_of_a_half_and_passes_gradients_straight():
    relaxation = PaS(gates_of(gated(prune=("mlp",))))
    relaxation.learned["mlp"].data[0, :2] = torch.tensor([0.5, 0.49])
    masks = relaxation.masks(0.0)["mlp"]
    assert masks[0, :3].tolist() == [1.0, 0.0, 1.0]
    masks.sum().backward()
    assert torch.equal(relaxation.learned["mlp"].grad, torch.ones(3, 20))


def test_the_multipliers_of_the_lagrangian_ascend_and_its_gates_descend():
    gates = gates_of(gated(target_schedule="constant", target=0.7))
    relaxation = HardConcrete(gates)
    relaxation.multipliers.data[0] = 1.0
    relaxation.penalty(0.5).backward()
    excess = kept_resource(gates, {n: open_probability(a) for n, a in relaxation.learned.items()}) - 0.7
    assert float(excess.detach()) > 0.1
    assert relaxation.multipliers.grad.tolist() == pytest.approx(
        [-float(excess.detach()), -(float(excess.detach()) ** 2)]
    )
    assert all((a.grad > 0).all() for a in relaxation.learned.values())


# ---- masks ----
def test_masks_of_a_strategy_are_those_of_the_search():
    model, batch = gated(("kv", "mlp", "layers")), token_batch()
    gates = gates_of(model)
    generator = torch.Generator().manual_seed(0)
    for name in gates.dims:
        gates.raw_importance(name).copy_(torch.rand(gates.raw_importance(name).shape, generator=generator))
    gates.num_updates = 100
    gates.prune_ratio.data.fill_(0.4)
    expected = model.eval()(**batch).logits
    hard = {name: gates.log_masks[name] for name in gates.dims}
    with masked_by(model) as masks, torch.no_grad():
        masks.update({name: torch.stack(rows).exp().view(gates.dims[name].rows, -1) for name, rows in hard.items()})
        found = model(**batch).logits
        masks.update({name: torch.ones_like(mask) for name, mask in masks.items()})
        assert torch.equal(model(**batch).logits, tiny_llama().eval()(**batch).logits)
    assert relative_difference(found, expected) < 1e-6


def test_the_kept_resource_of_hard_masks_is_that_of_their_sizes():
    gates = gates_of(gated(("kv", "mlp", "layers")))
    kept = units(gates, 1.0)
    assert float(kept_resource(gates, kept).detach()) == pytest.approx(1.0)
    with torch.no_grad():
        kept["layers"][0, 1] = 0
    assert float(kept_resource(gates, kept).detach()) == pytest.approx(2 / 3)  # all layers cost the same


def test_scales_fold_into_the_weights_that_read_a_unit():
    model, batch = gated(), token_batch()
    scales = {name: torch.rand(dim.rows, dim.units) + 0.5 for name, dim in gates_of(model).dims.items()}
    with masked_by(model) as masks, torch.no_grad():
        masks.update(scales)
        expected = model.eval()(**batch).logits
    fold_(model, scales)
    assert relative_difference(model(**batch).logits, expected) < 1e-5


# ---- what they learn ----
@pytest.mark.parametrize("make", [ElementSelection, PaS, HardConcrete, Projected, TopK])
def test_units_that_the_loss_needs_end_above_those_that_it_does_not(make):
    torch.manual_seed(0)
    gates = gates_of(gated(prune=("mlp",), target=0.75))
    relaxation = make(gates)
    optimizer = torch.optim.Adam(list(relaxation.parameters()), lr=relaxation.rate)
    for step in range(60):
        masks = relaxation.masks(step / 60)
        loss = 20 * (1 - masks["mlp"][:, :10]).square().mean() + relaxation.penalty(step / 60)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = relaxation.scores()["mlp"].detach()
    assert scores[:, :10].mean() > scores[:, 10:].mean()


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_choice_leaves_the_weights_alone_and_its_masks_bend_to_the_budget(name):
    torch.manual_seed(0)
    model, dense = gated(target=0.75, target_ramp=0.5), tiny_llama()
    choose_(model, name, labelled(8))
    assert gates_of(model).rounded is None
    if not CRITERIA[name].changes_weights:
        for (path, expected), found in zip(dense.named_parameters(), (p for n, p in model.named_parameters())):
            assert torch.equal(found, expected), path
            assert found.requires_grad
    plan = plan_of(model)
    pruned = prune(model)
    kept = sum(p.numel() for n, p in pruned.named_parameters() if ".layers." in n)
    assert kept <= 0.75 * sum(p.numel() for n, p in dense.named_parameters() if ".layers." in n)
    assert sum(plan.sizes["mlp"]) < 60


@pytest.mark.parametrize("name", ["pas", "dms_plain"])
def test_scales_are_learned_beside_masks_and_the_cut_has_them(name):
    torch.manual_seed(0)
    model, batch = gated(pipeline="p-", scales="norms"), labelled(1)[0]
    choose_(model, name, [batch] * 16)
    scales = gates_of(model).scales
    assert all((scale != 0).any() and not scale.requires_grad for scale in scales.values())
    pruned = prune(model, inputs=batch)  # proves that it computes what the masked model computes
    for scale in scales.values():
        scale.zero_()
    # The same units without their scales do worse on the text that both were learned on.
    with torch.no_grad():
        assert pruned(**batch).loss < prune(model)(**batch).loss


def test_the_loss_reaches_every_mask():
    """With the budget far away, gradients of the model's own loss move every unit's logit."""
    model = gated(target=1.0)
    relaxation = ElementSelection(gates_of(model))
    before = {name: logit.detach().clone() for name, logit in relaxation.learned.items()}
    torch.manual_seed(0)
    train_masks(model, relaxation, labelled(3))
    assert all((before[name] != logit.detach()).float().mean() > 0.5 for name, logit in relaxation.learned.items())
