"""Searches over whole plans: scores worked by hand, every plan keeps the budget, and the best one is taken."""

import math

import pytest
import torch
from helpers.tiny import tiny_llama, token_batch

import hf_dms.strategies.candidates as candidates
from hf_dms import DMSConfig, attach_, plan_of
from hf_dms.gating.attach import gates_of
from hf_dms.refit.curvature import frozen
from hf_dms.strategies.candidates import (
    evolve,
    minus_loss,
    random_genes,
    shrink,
    sizes_of,
    zico,
    zico_score,
)
from hf_dms.strategies.learned import hard_masks, masked_by
from hf_dms.strategies.one_shot import choose_


def gated(prune=("kv", "mlp"), target=0.7, layout="per_layer"):
    model = tiny_llama()
    attach_(model, DMSConfig(target=target, layout=layout, resource_scope="layers", prune=prune))
    for name in gates_of(model).dims:
        importance = gates_of(model).raw_importance(name)
        importance.copy_(torch.rand(importance.shape, generator=torch.Generator().manual_seed(0)))
    return model


def labelled(count):
    batches = [token_batch(seed=seed) for seed in range(count)]
    return [batch | {"labels": batch["input_ids"]} for batch in batches]


def kept(gates, sizes):
    return float(gates.resource(gates.dense_sizes() | sizes))


# ---- scores ----
def test_zico_by_hand():
    """Weight 1: mean 2, deviation 1. Weight 2: mean of |g| 6, deviation 2. Weight 3 does not vary."""
    found = zico([torch.tensor([1.0, 4.0, 5.0]), torch.tensor([3.0, 8.0, 5.0])])
    assert float(found) == pytest.approx(math.log(2 + 3))
    signs = zico([torch.tensor([-1.0]), torch.tensor([3.0])])  # mean of |g| 2, deviation 2
    assert float(signs) == pytest.approx(math.log(1))


def test_the_score_of_a_plan_is_the_sum_over_its_maps_of_what_autograd_gives():
    model, batches = gated(("mlp",)), labelled(2)
    with frozen(model), masked_by(model) as masks:
        found = zico_score(model, masks, batches)({"mlp": torch.ones(3, 20)})
    dense, expected = tiny_llama(), 0.0
    weights = [p for n, p in dense.named_parameters() if ".layers." in n and p.dim() == 2]
    gradients = [torch.autograd.grad(dense(**batch).loss, weights) for batch in batches]
    for first, second in zip(*gradients):
        expected += float(zico([first, second]))
    assert found == pytest.approx(expected, rel=1e-4)


def test_minus_loss_is_that_of_the_masked_model():
    model, batches = gated(("mlp",)), labelled(2)
    with frozen(model), masked_by(model) as masks:
        found = minus_loss(model, masks, batches)({"mlp": torch.ones(3, 20)})
        worse = minus_loss(model, masks, batches)({"mlp": torch.zeros(3, 20)})
    losses = [float(tiny_llama()(**batch).loss.detach()) for batch in batches]
    assert found == pytest.approx(-sum(losses) / 2)
    assert worse != found


# ---- plans ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_every_candidate_keeps_the_budget_nearly_whole(layout):
    gates = gates_of(gated(("kv", "mlp", "layers"), layout=layout))
    torch.manual_seed(0)
    for _ in range(10):
        assert 0.3 < kept(gates, sizes_of(gates, random_genes(gates))) <= 0.7


def test_sizes_are_in_proportion_to_genes():
    gates = gates_of(gated(("mlp",), 0.75))
    sizes = sizes_of(gates, {"mlp": torch.tensor([0.2, 0.4, 0.6])})["mlp"]
    assert (sizes / sizes[0]).tolist() == pytest.approx([1, 2, 3], rel=0.15)


@pytest.mark.parametrize("mutate", [False, True])
def test_the_fittest_of_all_tries_is_taken(mutate):
    gates = gates_of(gated(("mlp",), 0.75))
    torch.manual_seed(0)
    tried = []

    def fitness(masks):
        tried.append(float(masks["mlp"][2].sum() - masks["mlp"][0].sum()))
        return tried[-1]

    sizes = evolve(gates, fitness, 20, mutate)["mlp"]
    assert len(tried) == 20
    assert float(sizes[2] - sizes[0]) == max(tried)
    if mutate:
        assert max(tried[11:]) >= max(tried[:11])


def test_steps_go_where_they_cost_least():
    gates = gates_of(gated(("mlp",), 0.75))

    def fitness(masks):
        return float(masks["mlp"][1].sum())  # only layer 1 matters

    sizes = shrink(gates, fitness, steps=3)["mlp"]
    assert kept(gates, {"mlp": sizes}) <= 0.75
    assert sizes[1] == 20


@pytest.mark.parametrize("name", ["zero_shot", "one_shot", "multi_shot"])
def test_the_cut_has_the_sizes_of_the_plan_that_was_found(name, monkeypatch):
    found = []
    for each in ("evolve", "shrink"):
        real = getattr(candidates, each)
        monkeypatch.setattr(candidates, each, lambda *a, real=real, **o: found.append(real(*a, **o)) or found[-1])
    torch.manual_seed(0)
    model = gated(target=0.75)
    choose_(model, name, labelled(12))
    assert len(found) == 1
    sizes = plan_of(model).sizes
    for dim, wanted in found[0].items():
        assert sum(abs(a - int(b)) for a, b in zip(sizes[dim], wanted)) <= 3, dim  # rounding fills the budget


def test_hard_masks_keep_the_most_important_units():
    gates = gates_of(gated(("mlp",)))
    masks = hard_masks(gates, {"mlp": torch.tensor([5.0, 1.0, 20.0])})["mlp"]
    assert masks.sum(-1).tolist() == [5, 1, 20]
    assert int(masks[1].argmax()) == int(gates.importance("mlp")[1].argmax())
