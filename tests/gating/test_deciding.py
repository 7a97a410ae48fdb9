"""Late in a search the coarse dims get whole sizes, so the searched model at the end is the model that is cut."""

import copy

import pytest
import torch
from helpers.searches import bit_equal, logged, stories, trained, weights
from helpers.tiny import search_, tiny_llama, token_batch

from hf_dms import DMSConfig, attach_
from hf_dms.cut.prune import plan_of
from hf_dms.gates import Gates
from hf_dms.gating.attach import gates_of
from hf_dms.gating.rounding import sizes_of


def searched(seed=0, **options):
    """A model past its warm-up, with random ratios and importance."""
    model = tiny_llama()
    attach_(model, DMSConfig(**({"target": 0.6, "layout": "per_layer"} | options)))
    search_(model, seed)
    return model, gates_of(model)


def backward(model):
    batch = token_batch()
    model.train()
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_decided_dims_run_on_the_masks_of_the_cut_in_training_too(layout):
    model, gates = searched(layout=layout)
    plan = plan_of(model)
    gates.decide_(0.84)
    assert gates.decided == {}
    gates.decide_(0.85)
    assert set(gates.decided) == {"kv", "hidden", "layers"}
    backward(model)
    for name in gates.decided:
        masks = torch.stack(gates.log_masks[name]).exp()
        assert [row.nonzero().flatten().tolist() for row in masks] == [row.tolist() for row in plan.kept[name]]
        assert set(masks.unique().tolist()) <= {0.0, 1.0}
        assert gates.soft_fraction(name) == 0
    before = {name: gates.raw_importance(name).clone() for name in gates.dims}
    gates.update_importance_()
    assert all(gates.raw_importance(name).isfinite().all() for name in gates.dims)
    for name in gates.decided:  # kept units gather importance as before, removed ones fade
        mask = torch.stack(gates.log_masks[name]).exp()
        assert torch.allclose(gates.raw_importance(name)[mask == 0], 0.99 * before[name][mask == 0])
    gathered = gates.raw_importance("layers")[0] > 0.99001 * before["layers"][0]
    assert torch.equal(gathered.float(), torch.stack(gates.log_masks["layers"]).exp()[0])
    assert not set(torch.stack(gates.log_masks["mlp"]).exp().unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_decided_ratios_stay_and_have_no_gradient_while_the_finest_move(layout):
    model, gates = searched(layout=layout)
    gates.decide_(0.9)
    decided = {name: gates.ratio(name).clone() for name in gates.decided}
    backward(model)
    gates.resource_loss().backward()
    assert float(gates.resource().detach()) == pytest.approx(0.6, abs=1e-5)
    assert all(not gates._of_dim(gates.prune_ratio.grad, name).any() for name in decided)
    assert gates._of_dim(gates.prune_ratio.grad, "mlp").any()
    for _ in range(3):
        with torch.no_grad():
            gates.prune_ratio.add_(0.3 * torch.rand(gates.prune_ratio.shape) - 0.1)
        gates.clamp_ratios_()
        assert float(gates.resource().detach()) == pytest.approx(0.6, abs=1e-5)
    assert all(torch.equal(gates.ratio(name), ratio) for name, ratio in decided.items())
    assert torch.equal(gates.soft_sizes()["layers"].round(), gates.decided["layers"].float())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_the_cut_has_the_decided_sizes_however_far_the_finest_went_astray(layout, seed):
    _, gates = searched(seed, layout=layout)
    gates.decide_(0.9)
    rows = torch.ones(3, dtype=torch.bool)
    rows[gates.importance("layers")[0].argsort()[: 3 - int(gates.decided["layers"])]] = False
    for ratio in (0.0, 0.4, 1.0):
        with torch.no_grad():
            gates._of_dim(gates.prune_ratio, "mlp").fill_(ratio)
        sizes = sizes_of(gates)
        assert torch.equal(sizes["layers"], gates.decided["layers"])
        assert torch.equal(sizes["hidden"], gates.decided["hidden"])
        assert torch.equal(sizes["kv"][rows], gates.decided["kv"][rows])


def test_without_channels_to_absorb_the_rest_all_is_decided():
    _, gates = searched(prune=("kv", "layers"))
    sizes = sizes_of(gates)
    gates.decide_(0.9)
    assert bit_equal(gates.decided, sizes)
    assert bit_equal(sizes_of(gates), sizes)


@pytest.mark.parametrize("options", [{"protect": {"layers": [0, 1, 2]}}, {"round_to": {"kv": 3, "mlp": 20}}])
def test_a_search_goes_on_where_no_size_is_left_to_learn(options):
    model, gates = searched(prune=("kv", "mlp"), target=1.0, **options)
    gates.decide_(0.9)
    model.train()(**token_batch())
    assert not gates.prune_ratio.any()


def test_a_state_from_before_the_decision_lets_the_ratios_move_again():
    _, gates = searched()
    before = copy.deepcopy(gates.search_state())
    gates.decide_(0.9)
    after = copy.deepcopy(gates.search_state())
    assert not bit_equal(before, after)
    gates.load_search_state_(before)
    assert gates.decided == {}
    assert (gates.lower == 0).all()
    assert bit_equal(gates.search_state(), before)
    _, fresh = searched(seed=1)
    fresh.load_search_state_(after)
    assert bit_equal(fresh.search_state(), after)
    assert torch.equal(fresh.lower[:3], fresh.upper[:3])
    assert fresh.found_resource == pytest.approx(float(after["found_resource"]))
    assert fresh.decided.keys() == {"kv", "hidden", "layers"}


def test_nothing_is_decided_in_the_warm_up_or_if_decide_at_is_one():
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.6, warmup_steps=3))
    gates_of(model).decide_(0.99)
    assert gates_of(model).decided == {}
    _, gates = searched(decide_at=1.0)
    gates.decide_(1.0)
    assert gates.decided == {}


def test_sizes_are_brought_to_the_target_once_per_move(monkeypatch):
    model, gates = searched()
    gates.decide_(0.9)
    met, meet = [], Gates._meet_target_
    monkeypatch.setattr(Gates, "_meet_target_", lambda gates: met.append(meet(gates)))
    gates.clamp_ratios_()
    backward(model), backward(model)
    assert len(met) == 0  # `decide_` has met the target already
    gates.update_importance_()  # another ranking of the layers may change the cost
    backward(model), backward(model)
    assert len(met) == 1
    with torch.no_grad():
        gates.prune_ratio.sub_(0.01)
    gates.clamp_ratios_()
    backward(model), backward(model)
    assert len(met) == 2
    assert float(gates.resource().detach()) == pytest.approx(0.6, abs=1e-5)
    gates.load_search_state_(gates.search_state())  # restored exactly, so that a resumed search continues bit by bit
    backward(model)
    assert len(met) == 2
    with torch.no_grad():
        gates.prune_ratio.sub_(0.01)  # the saved copy of the ratios must not move with them
    backward(model)
    assert len(met) == 3
    astray = gates.search_state() | {"prune_ratio": (gates.prune_ratio.detach() - 0.01).clamp(min=0)}
    gates.load_search_state_(astray)
    backward(model)
    assert len(met) == 4


@pytest.mark.parametrize("target", [0.6, 0.85])  # at 0.85 some layers are whole before others are large enough
def test_sizes_are_brought_to_the_target_by_one_factor(target):
    _, gates = searched(target=target)
    gates.decide_(0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        sizes = 0.06 + 0.9 * torch.rand(3, generator=generator)
        with torch.no_grad():
            gates._of_dim(gates.prune_ratio, "mlp").copy_(1 - sizes)
        gates.clamp_ratios_()
        assert float(gates.resource().detach()) == pytest.approx(target, abs=1e-5)
        found = 1 - gates.ratio("mlp").detach()
        free = (found > 0.0501) & (found < 0.9999)  # the smallest size is one unit of twenty
        factors = (found / sizes)[free]
        assert free.any()
        assert torch.allclose(factors, factors[:1], rtol=1e-4)


# ---- in a search ----
WIDE = dict(intermediate_size=200)
STEPS = dict(max_steps=24, save_strategy="steps")


def ended(folder, decide_at, changes=(), **options):
    config = dict(decide_at=decide_at, gate_learning_rate=0.05, target=0.7, prune=("kv", "mlp", "layers"))
    return trained(folder, config | dict(changes), tiny_llama(**WIDE), **(STEPS | options))


def test_the_loss_on_soft_masks_at_the_end_is_that_of_the_cut(tmp_path):
    losses = {at: ended(tmp_path / str(at), at).soft_and_cut_loss() for at in (0.7, 1.0)}
    gaps = {at: abs(soft - cut) for at, (soft, cut) in losses.items()}
    assert gaps[0.7] < 0.02
    assert gaps[1.0] > 3 * gaps[0.7]


REFITTED = dict(search_over="refitted", pipeline="p-", prune=("kv", "mlp"), warmup_steps=0, layout="per_layer")


@pytest.mark.parametrize("changes", [{}, REFITTED])
def test_both_losses_are_those_of_a_forward_pass_on_soft_and_on_hard_masks(changes, tmp_path):
    trainer = ended(tmp_path, 0.7, changes)
    found_soft, found_cut = trainer.soft_and_cut_loss()
    assert found_cut == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    entries = len(trainer.state.log_history)
    batch = token_batch(8, 8, seed=1)
    trainer.gates.train()
    with torch.no_grad():
        soft = trainer.model(**batch, labels=batch["input_ids"]).loss
    assert found_soft == pytest.approx(float(soft), rel=1e-5)
    assert found_soft != pytest.approx(found_cut, rel=1e-5)
    assert len(trainer.state.log_history) == entries


def test_a_trainer_decides_once_and_logs_no_soft_units_from_then_on(tmp_path):
    trainer = ended(tmp_path, 0.7)
    first = next(step for step in range(1, 25) if (step - 1 - 2) / 22 >= 0.7)
    for name in ("kv", "layers"):
        found = logged(trainer, f"soft_fraction/{name}")
        assert max(found[: first - 1]) > 0
        assert found[first - 1 :] == [0.0] * (24 - first + 1)
        assert len(set(logged(trainer, f"kept/{name}")[first - 1 :])) == 1


@pytest.mark.parametrize("interval", [9, 20])  # a checkpoint before the decision, and one after it
def test_a_resumed_search_decides_as_an_uninterrupted_one(interval, tmp_path):
    whole = ended(tmp_path / "whole", 0.7, save_steps=interval)
    checkpoint = tmp_path / "whole" / f"checkpoint-{interval}"
    resumed = ended(tmp_path / "resumed", 0.7, save_steps=interval, resume=str(checkpoint))
    assert bit_equal(resumed.gates.search_state(), whole.gates.search_state())
    assert bit_equal(weights(resumed.model), weights(whole.model))
    assert stories(resumed)[-3:] == stories(whole)[-3:]


def test_a_search_that_had_not_arrived_when_it_decided_is_told(tmp_path):
    config = dict(decide_at=0.7, gate_learning_rate=1e-4, target=0.7, prune=("kv", "mlp", "layers"))
    trainer = trained(tmp_path, config, tiny_llama(**WIDE), max_steps=24)
    outcome = trainer.search_outcome()
    assert float(trainer.gates.resource().detach()) <= 0.7001
    assert outcome["learned"] > 0.95
    assert outcome["verdict"] == "above"


@pytest.mark.parametrize("size", [[0, 1, 1], [1, 1], [1, 1, 4]])
def test_a_state_with_impossible_decided_sizes_is_refused(size):
    _, gates = searched()
    with pytest.raises(ValueError, match="search state: decided_kv holds sizes that kv cannot have"):
        gates.load_search_state_(gates.search_state() | {"decided_kv": torch.tensor(size)})
