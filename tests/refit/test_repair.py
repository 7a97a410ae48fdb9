"""Repair: the equations that it solves, what it does not change, and the gain on unseen data."""

import pytest
import torch
from helpers.laws import tiny
from helpers.marks import ordinary_if
from helpers.refit import batches_for, captured, cut_by, layers_of, text, weights_of_positions
from helpers.tiny import relative_difference, search_, token_batch
from transformers import (
    BeitForImageClassification,
    BertForMaskedLM,
    Data2VecVisionForImageClassification,
    Dinov2ForImageClassification,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2ForCausalLM,
    SmolLM3ForCausalLM,
    ViTForImageClassification,
)

from hf_dms import DMSConfig, attach_, plan_of, prune, repair_
from hf_dms.cut.plan import Plan
from hf_dms.cut.verify import outputs_of
from hf_dms.refit.curvature import Sums
from hf_dms.refit.least_squares import RIDGES, best_ridge, ridge_change

CLASSES = (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SmolLM3ForCausalLM,
    BertForMaskedLM,
    ElectraForMaskedLM,
    DistilBertForMaskedLM,
    ViTForImageClassification,
)
BEITS = (BeitForImageClassification, Data2VecVisionForImageClassification)
SCALING = (GraniteForCausalLM, Dinov2ForImageClassification, *BEITS)  # outputs are scaled before they are added
NORMALISING = (Gemma2ForCausalLM, Gemma3ForCausalLM)  # outputs are normalised before they are added
MLP = (torch.arange(20), torch.arange(2, 20, 2), torch.arange(7))
LAYERS, HIDDEN = (torch.tensor([0, 2]),), (torch.arange(24)[torch.arange(24) % 4 != 1],)
PLANS = {
    "per_layer": Plan({"mlp": MLP}),
    "uniform": Plan({"mlp": (torch.arange(9), torch.arange(2, 20, 2), torch.arange(11, 20))}),
    "depth": Plan({"layers": LAYERS}),
    "first layer gone": Plan({"layers": (torch.tensor([1, 2]),)}),
    "all": Plan({"mlp": MLP, "layers": LAYERS, "hidden": HIDDEN}),
}


def same_tensors(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- what is solved ----
@pytest.mark.parametrize("cls", [*CLASSES, *SCALING, *NORMALISING, GemmaForCausalLM])
def test_a_cut_that_changes_nothing_is_left_as_it_is(cls):
    model = tiny(cls)
    pruned = cut_by(model, Plan({}))
    before = copy_of(pruned)
    repair_(pruned, model, Plan({}), batches_for(model))
    assert same_tensors(pruned, before)


MAPS = {  # the last map that writes, and the module whose input or output it has to restore
    LlamaForCausalLM: ("mlp.down_proj", "", "output"),
    Qwen2ForCausalLM: ("mlp.down_proj", "", "output"),
    ViTForImageClassification: ("mlp.fc2", "", "output"),
    BertForMaskedLM: ("output.dense", "output.LayerNorm", "input"),
    DistilBertForMaskedLM: ("ffn.lin2", "output_layer_norm", "input"),
}


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("cls", MAPS)
def test_a_map_gets_the_ridge_regression_of_what_the_stream_lacks(cls, ridge):
    options = {LlamaForCausalLM: {"mlp_bias": True}}.get(cls, {})
    if cls is Qwen2ForCausalLM:  # its layers are called with different arguments
        options = {
            "layer_types": ["full_attention", "sliding_attention"],
            "use_sliding_window": True,
            "sliding_window": 3,
        }
    model = tiny(cls, dtype=torch.float64, num_hidden_layers=2, **options)
    plan = Plan({"mlp": (torch.arange(20), torch.arange(1, 20, 2))})
    pruned = cut_by(model, plan)
    batches = batches_for(model)
    path, place, side = MAPS[cls]
    module, side = layers_of(pruned)[1].get_submodule(path), ["input", "output"].index(side)
    inputs = captured(pruned, module, batches)[0]
    missing = captured(model, layers_of(model)[1].get_submodule(place), batches)[side]
    missing = missing - captured(pruned, layers_of(pruned)[1].get_submodule(place), batches)[side]
    weights = weights_of_positions(model, 1, batches).sqrt()
    strength = (ridge * (weights * inputs).square().sum() / inputs.shape[1]).sqrt()
    if module.bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    inputs, missing = weights * inputs, weights * missing
    rows = torch.cat([inputs, strength * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    change = torch.linalg.lstsq(
        rows, torch.cat([missing, torch.zeros(inputs.shape[1], 24, dtype=inputs.dtype)])
    ).solution
    before = copy_of(pruned)
    repair_(pruned, model, plan, batches, ridge=ridge)
    after = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[name])}
    name = next(name for name, found in pruned.named_modules() if found is module)
    assert after == {f"{name}.weight"} | ({f"{name}.bias"} if module.bias is not None else set())
    assert relative_difference(module.weight - before[f"{name}.weight"], change[:10].T) < 1e-6
    if module.bias is not None:
        assert relative_difference(module.bias - before[f"{name}.bias"], change[10]) < 1e-6


@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM])
def test_the_last_map_before_dropped_layers_makes_up_for_them(cls):
    model = tiny(cls)
    plan = Plan({"layers": (torch.tensor([0, 1]),)})
    pruned = cut_by(model, plan)
    before = copy_of(pruned)
    repair_(pruned, model, plan, batches_for(model))
    changed = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[name])}
    path, norm, _ = MAPS[cls]
    assert {name.split(".1.")[1].rpartition(".")[0] for name in changed} == ({path, norm} if norm else {path})
    for name, parameter in layers_of(pruned)[1].get_submodule(norm).named_parameters() if norm else ():
        assert torch.equal(parameter, layers_of(model)[2].get_submodule(norm).get_parameter(name))


# ---- that it helps ----
CASES = [(cls, plan, 0.9) for cls in CLASSES for plan in PLANS]
CASES += [(cls, plan, 0.9) for cls in SCALING for plan in ("per_layer", "depth", "first layer gone", "all")]
CASES += [(cls, plan, 0.97) for cls in NORMALISING for plan in ("per_layer", "uniform", "depth", "first layer gone")]


@pytest.mark.parametrize(
    ("cls", "plan", "share"),
    ordinary_if(
        lambda cls, plan, _: ((*CLASSES, *SCALING, *NORMALISING).index(cls) + list(PLANS).index(plan)) % 2 == 0, CASES
    ),
)
def test_stream_and_outputs_come_closer_on_held_out_data(cls, plan, share):
    model = tiny(cls)
    layout, plan = "uniform" if plan == "uniform" else "per_layer", PLANS[plan]
    pruned = cut_by(model, plan, layout)
    held_out = batches_for(model, seed=2, batches=4)
    units = plan.kept.get("hidden", (slice(None),))[0]

    def errors():
        found, expected = (captured(m, layers_of(m)[-1], held_out)[1] for m in (pruned, model))
        yield float((found - expected[:, units]).square().mean())
        yield sum(float((outputs_of(pruned, b) - outputs_of(model, b)).square().mean()) for b in held_out)

    stream, outputs = errors()
    repair_(pruned, model, plan, batches_for(model, seed=1))
    new_stream, new_outputs = errors()
    assert new_stream < share * stream
    assert new_outputs < share * outputs


@pytest.mark.parametrize("cls", NORMALISING)
def test_positions_at_which_a_map_in_front_of_a_norm_writes_nothing_do_not_count(cls):
    """A single unit is exactly 0 at some positions: its activation function is where its input is far below 0."""
    model = tiny(cls)
    for unit in range(4):
        plan = Plan({"mlp": (torch.tensor([unit]),) * 3})
        pruned = cut_by(model, plan)
        repair_(pruned, model, plan, batches_for(model))
        assert all(parameter.isfinite().all() for parameter in pruned.parameters())


@pytest.mark.parametrize("cls", [*SCALING, *NORMALISING])
def test_what_a_map_lacks_is_stated_before_the_scale_or_norm_behind_it(cls):
    """With as many inputs as positions, least squares are exact. Behind a norm they are exact to first order only."""
    model = tiny(cls, dtype=torch.float64, num_hidden_layers=1)
    batch = {name: value[:2] for name, value in batches_for(model)[0].items()}
    if "input_ids" in batch:
        batch = {name: value[:1, :6] for name, value in batch.items()}
    pruned = cut_by(model, Plan({}))
    path = {Dinov2ForImageClassification: "mlp.fc2", BEITS[0]: "mlp.fc2", BEITS[1]: "output.dense"}.get(
        cls, "mlp.down_proj"
    )
    module = layers_of(pruned)[0].get_submodule(path)
    noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)).to(module.weight)
    module.weight.data += 1e-3 * module.weight.std() * noise

    def error():
        found, expected = (captured(m, layers_of(m)[0], [batch])[1] for m in (pruned, model))
        return float((found - expected).norm())

    before = error()
    repair_(pruned, model, Plan({}), [batch], ridge=1e-12)
    assert error() < 5e-3 * before


@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM, ViTForImageClassification])
def test_a_bfloat16_model_is_repaired_in_its_dtype(cls):
    model = tiny(cls, dtype=torch.bfloat16)
    pruned = cut_by(model, PLANS["per_layer"])
    batches, held_out = batches_for(model), batches_for(model, seed=2)[0]
    expected, before = outputs_of(model, held_out), outputs_of(pruned, held_out)
    repair_(pruned, model, PLANS["per_layer"], batches)
    assert {tensor.dtype for tensor in pruned.state_dict().values()} == {torch.bfloat16}
    assert (outputs_of(pruned, held_out) - expected).square().mean() < (before - expected).square().mean()


# ---- what counts, and what is left alone ----
@pytest.mark.parametrize("cls", [GraniteForCausalLM, BertForMaskedLM])
def test_a_batch_in_which_no_position_counts_says_nothing(cls):
    model, batches = tiny(cls), list(text(1))
    empty = batches[1] | {"attention_mask": torch.zeros_like(batches[1]["attention_mask"])}
    repaired = []
    for given in (batches, [*batches, empty]):
        pruned = cut_by(model, PLANS["all"])
        repair_(pruned, model, PLANS["all"], given, ridge=0.1)
        repaired.append(copy_of(pruned))
    for name, tensor in repaired[0].items():
        assert relative_difference(tensor, repaired[1][name]) < 1e-5


@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM])
def test_padding_does_not_count(cls):
    def repaired(token):
        model = tiny(cls)
        pruned = cut_by(model, PLANS["all"])
        batches = list(text(1))
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = token
        repair_(pruned, model, PLANS["all"], batches)
        return pruned

    expected = copy_of(repaired(5))
    for name, tensor in repaired(29).state_dict().items():
        assert relative_difference(tensor, expected[name]) < 1e-5


def test_with_gates_on_the_dense_model_their_plan_is_repaired_and_they_are_open():
    model = tiny(LlamaForCausalLM)
    attach_(model, DMSConfig(target=0.7, prune=("kv", "mlp", "hidden"), layout="per_layer", pipeline="p-"))
    search_(model)
    plan, pruned = plan_of(model), prune(model)
    other = cut_by(tiny(LlamaForCausalLM), plan)
    repair_(other, tiny(LlamaForCausalLM), plan, text(1))
    repair_(pruned, model, None, text(1))
    for name, tensor in pruned.state_dict().items():
        assert relative_difference(tensor, other.state_dict()[name]) < 1e-3


def test_hidden_states_may_wait_in_files(tmp_path):
    model = tiny(Qwen2ForCausalLM)
    pruned, other = cut_by(model, PLANS["all"]), cut_by(model, PLANS["all"])
    repair_(pruned, model, PLANS["all"], text(1))
    repair_(other, model, PLANS["all"], text(1), offload=tmp_path)
    assert same_tensors(other, pruned.state_dict())
    assert not any(tmp_path.iterdir())


def test_progress_is_told_after_each_layer():
    model, told = tiny(LlamaForCausalLM), []
    repair_(
        cut_by(model, PLANS["depth"]), model, PLANS["depth"], text(1, batches=2),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(1, 2), (2, 2)]


# ---- the ridge ----
def sums_of(rows, noise, seed=0, truth=None):
    """Sums of a map of 10 inputs. Its output lacks `truth` times the inputs, and noise."""
    generator = torch.Generator().manual_seed(seed)
    sums = Sums.of(torch.nn.Linear(10, 3, bias=False))
    inputs = torch.randn(rows, 10, generator=generator).double()
    sums.add_(inputs, inputs @ truth + noise * torch.randn(rows, 3, generator=generator).double())
    return sums, inputs


def test_the_chosen_ridge_leaves_the_least_error_on_held_out_positions():
    truth = torch.randn(10, 3, generator=torch.Generator().manual_seed(9)).double()
    for rows, noise in ((12, 3.0), (200, 0.1)):
        fitted, _ = sums_of(rows, noise, 1, truth)
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(50, 10, generator=generator).double()
        missing = inputs @ truth + noise * torch.randn(50, 3, generator=generator).double()
        held_out = Sums.of(torch.nn.Linear(10, 3, bias=False))
        held_out.add_(inputs, missing)
        errors = {r: float((missing - inputs @ ridge_change(fitted, 10, r)).square().sum()) for r in RIDGES}
        assert best_ridge(fitted, held_out, 10) == min(errors, key=errors.get)


def test_noisy_activations_get_a_larger_ridge_than_clean_ones():
    truth = torch.randn(10, 3, generator=torch.Generator().manual_seed(9)).double()
    noisy = best_ridge(sums_of(12, 3.0, 1, truth)[0], sums_of(50, 3.0, 2, truth)[0], 10)
    clean = best_ridge(sums_of(200, 0.1, 1, truth)[0], sums_of(50, 0.1, 2, truth)[0], 10)
    assert noisy > clean == RIDGES[0]


def test_batches_may_be_a_generator_and_may_have_labels():
    model = tiny(LlamaForCausalLM)
    pruned = cut_by(model, PLANS["all"])
    other = cut_by(model, PLANS["all"])
    repair_(pruned, model, PLANS["all"], (b | {"labels": b["input_ids"]} for b in text(1)))
    repair_(other, model, PLANS["all"], list(text(1)))
    assert same_tensors(pruned, other.state_dict())


def test_fewer_tokens_than_inputs_are_enough():
    model = tiny(LlamaForCausalLM)
    pruned = cut_by(model, PLANS["per_layer"])
    batch = {"input_ids": token_batch(1, 4)["input_ids"]}
    before = (outputs_of(pruned, batch) - outputs_of(model, batch)).square().mean()
    repair_(pruned, model, PLANS["per_layer"], [batch])
    assert (outputs_of(pruned, batch) - outputs_of(model, batch)).square().mean() < before


@pytest.mark.parametrize("training", [False, True])
def test_the_dense_model_and_everything_else_stay_as_they_were(training):
    model = tiny(LlamaModel).train(training)
    pruned = cut_by(model, PLANS["all"])
    dense, before = copy_of(model), copy_of(pruned)
    pruned.train(training)
    repair_(pruned, model, PLANS["all"], text(1))
    assert same_tensors(model, dense)
    changed = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[name])}
    maps = {f"self_attn.{kind}_proj" for kind in "qkvo"} | {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    assert {name.split(".", 2)[2] for name in changed} == {f"{path}.weight" for path in maps}
    for module in [*model.modules(), *pruned.modules()]:
        assert module.training is training
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


# ---- errors ----
def test_what_cannot_be_repaired_is_an_error():
    model, plan = tiny(LlamaForCausalLM), PLANS["all"]
    pruned = cut_by(model, plan)
    with pytest.raises(ValueError, match="repair needs at least one batch, got none"):
        repair_(pruned, model, plan, [])
    with pytest.raises(ValueError, match=r"ridge must be positive, got 0\. Leave it out to have it chosen on held-out"):
        repair_(pruned, model, plan, text(1), ridge=0)
    with pytest.raises(ValueError, match=r"attention_mask of a batch has shape \(6, 1, 12, 12\), expected .batch, tok"):
        repair_(pruned, model, plan, [next(text(1)) | {"attention_mask": torch.ones(6, 1, 12, 12)}])
    with pytest.raises(
        ValueError, match=r"the pruned model has 2 layers and .* 18; the plan keeps 3 layers, .* and 24"
    ):
        repair_(pruned, model, Plan({}), text(1))
    shallow = cut_by(model, PLANS["depth"])
    with pytest.raises(ValueError, match=r"up to layer 2, .* the dense model has 2 and 24 .layers.\. Give the plan an"):
        repair_(shallow, shallow, PLANS["depth"], text(1))
    with pytest.raises(ValueError, match=r"no gates that say what was kept, so a plan is needed\. Give what hf_dms"):
        repair_(pruned, model, None, text(1))
    attach_(model, DMSConfig(target=0.9))
    with pytest.raises(ValueError, match=r"the pruned model has gates\. Take them off with hf_dms\.detach_"):
        repair_(model, model, plan, text(1))


def test_activations_that_are_not_finite_are_an_error_with_the_name_of_the_map():
    model = tiny(LlamaForCausalLM)
    pruned = cut_by(model, PLANS["per_layer"])
    layers_of(pruned)[1].mlp.up_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"least squares of mlp.down_proj of layer 1 have no finite solution at ridge"):
        repair_(pruned, model, PLANS["per_layer"], text(1))


@pytest.mark.parametrize("factor", ["mlp", "nan"])
def test_layers_that_add_in_another_way_are_an_error(factor):
    model = tiny(LlamaForCausalLM)
    mlp = layers_of(model)[0].mlp
    mlp.register_forward_hook(lambda module, args, output: output * (0.5 if factor == "mlp" else torch.nan))
    with pytest.raises(
        ValueError, match=r"layer write is not added to the residual stream as it is, scaled or .*cannot"
    ):
        repair_(cut_by(model, Plan({})), model, Plan({}), batches_for(model))
