"""One-shot structure by costs after a refit keeps the budget, uses one threshold, and beats weight magnitude."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for, bound_of, cut_by, labelled_batches
from transformers import BertForMaskedLM, LlamaForCausalLM, ViTForImageClassification

from hf_dms import DMSConfig, attach_, detach_, plan_of, repair_
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import gates_of
from hf_dms.gating.gates_for import build_gates
from hf_dms.refit.one_shot import one_shot_obs_plan, set_sizes_, sizes_below_one_threshold

CLASSES = (LlamaForCausalLM, BertForMaskedLM, ViTForImageClassification)


def request(model, target=0.6, layout="per_layer", **options):
    dims = tuple(dim.name for dim in bound_of(model).spec.dims if dim.scope == "layer")
    return DMSConfig(target=target, resource_scope="layers", prune=dims, layout=layout, **options)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_budget_is_kept_exactly_and_no_unit_more_fits(cls):
    model = tiny(cls)
    config = request(model)
    plan = one_shot_obs_plan(model, config, labelled_batches(model, batches=4))
    gates = build_gates(bound_of(model), model, config)
    sizes = {name: torch.tensor(found).float() for name, found in plan.sizes.items()}
    assert gates.resource(gates.dense_sizes() | sizes) <= 0.6
    for name, dim in gates.dims.items():
        for row in range(dim.rows):
            more = sizes[name] + torch.eye(dim.rows)[row]
            if more[row] <= dim.units:
                assert gates.resource(gates.dense_sizes() | sizes | {name: more}) > 0.6


@pytest.mark.parametrize("cls", CLASSES)
def test_after_repair_it_is_nearer_to_the_dense_model_than_magnitude(cls):
    model = tiny(cls)
    config, held_out = request(model), batches_for(model, seed=2)
    attach_(model, config)
    by_magnitude = plan_of(model)
    detach_(model)
    errors = []
    for plan in (one_shot_obs_plan(model, config, labelled_batches(model)), by_magnitude):
        pruned = cut_by(model, plan)
        repair_(pruned, model, plan, batches_for(model))
        errors.append(sum(float((outputs_of(pruned, b) - outputs_of(model, b)).square().mean()) for b in held_out))
    assert errors[0] < errors[1]


def test_a_uniform_layout_gets_one_size_for_all_layers():
    model = tiny(LlamaForCausalLM)
    config = request(model, layout="uniform")
    plan = one_shot_obs_plan(model, config, labelled_batches(model, batches=4))
    assert all(len(set(sizes)) == 1 for sizes in plan.sizes.values())


@pytest.mark.parametrize("options", [{"target": "3K"}, {"sizes": {"kv": 2, "mlp": 9}}])
def test_an_amount_or_a_shape_is_met(options):
    model = tiny(LlamaForCausalLM)
    config = DMSConfig(resource_scope="layers", **({"prune": ("kv", "mlp")} | options))
    plan = one_shot_obs_plan(model, config, labelled_batches(model, batches=4))
    if config.sizes:
        assert plan.sizes == {"kv": [2, 2, 2], "mlp": [9, 9, 9]}
    else:
        layers = cut_by(model, plan).model.layers
        assert sum(parameter.numel() for parameter in layers.parameters()) <= 3000


def test_of_all_layers_together_the_units_of_least_cost_per_parameter_go():
    model = tiny(LlamaForCausalLM)
    gates = build_gates(bound_of(model), model, request(model, 0.9))
    costs = {
        "kv": torch.full((3, 3), 1e9).double(),
        "mlp": torch.arange(60).view(3, 20).double(),  # row 0 is cheapest throughout
    }
    sizes = sizes_below_one_threshold(gates, costs)
    assert sizes["kv"].tolist() == [3, 3, 3]
    assert sizes["mlp"][1:].tolist() == [20, 20]
    assert sizes["mlp"][0] < 20


def test_a_unit_goes_no_sooner_than_those_behind_it_in_its_order():
    model = tiny(LlamaForCausalLM)
    gates = build_gates(bound_of(model), model, request(model, 0.9))
    cost = torch.full((3, 20), 5.0).double()
    cost[0, :10] = 0.0  # cheap units, but ten expensive ones have to go before them
    sizes = sizes_below_one_threshold(gates, {"kv": torch.full((3, 3), 1e9).double(), "mlp": cost})
    assert sizes["mlp"][0] == sizes["mlp"][1] == sizes["mlp"][2]


def test_ratios_are_set_dim_by_dim_whatever_the_order_of_the_sizes():
    model = tiny(LlamaForCausalLM)
    gates = build_gates(bound_of(model), model, request(model))
    sizes = {"mlp": torch.tensor([20, 7, 1]), "kv": torch.tensor([1, 3, 2])}
    set_sizes_(gates, sizes)
    assert all(torch.equal(gates.hard_units(name), size) for name, size in sizes.items())


def test_what_it_cannot_choose_is_an_error():
    model = tiny(LlamaForCausalLM)
    batches = labelled_batches(model, batches=1)
    with pytest.raises(
        ValueError, match=r"chooses widths of layers, not hidden and layers\. Prune only those, as prune"
    ):
        one_shot_obs_plan(model, DMSConfig(target=0.5, layout="per_layer"), batches)
    attach_(model, request(model))
    with pytest.raises(ValueError, match=r"needs a model without gates\. Take them off with hf_dms\.detach_"):
        one_shot_obs_plan(model, request(model), batches)
    assert gates_of(model)
