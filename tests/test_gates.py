"""Gates: their state stays float32 and outside the model's state, and importance is the moving average of (m·g)²."""

import copy

import pytest
import torch
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_dms import DMSConfig, attach_
from hf_dms.archs.costs import build_cost
from hf_dms.cut.prune import plan_of
from hf_dms.gates import GatedDim, Gates, SearchSchedule
from hf_dms.gating.attach import gates_of
from hf_dms.resource import Cost, scheduled_target
from hf_dms.topk import soft_topk_mask

DIMS = ("kv", "mlp", "hidden", "layers")


def gated(search=True, dtype=torch.float32, seed=0, **options):
    model = tiny_llama(dtype=dtype)
    attach_(model, DMSConfig(**({"target": 0.5, "layout": "per_layer", "warmup_steps": 3} | options)))
    if search:
        search_(model, seed)
    return model, gates_of(model)


def backward(model, batch, extra=None):
    """One backward pass of the task loss, in training mode."""
    model.train()
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    (loss if extra is None else loss + extra).backward()
    return loss.detach()


def importances(gates):
    return {name: gates.raw_importance(name).clone() for name in gates.dims}


def bit_equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


# ---- state ----
def test_the_state_dict_of_the_model_holds_nothing_of_the_gates():
    model, gates = gated()
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    ratios = gates.prune_ratio.detach().clone()
    model.load_state_dict(tiny_llama(seed=7).state_dict(), strict=True)
    assert torch.equal(gates.prune_ratio, ratios)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_gates_stay_float32_and_bit_equal_when_the_model_is_cast(cast):
    model, gates = gated()
    before = copy.deepcopy(gates.search_state())
    cast(model)
    assert model.dtype != torch.float32
    assert gates.prune_ratio.dtype == gates.lower.dtype == gates.upper.dtype == torch.float32
    assert bit_equal(gates.search_state(), before)
    assert all(state.dtype == torch.float32 for name, state in gates.search_state().items() if name != "num_updates")


def test_gates_follow_the_model_to_another_device():
    model, gates = gated()
    model.to("meta")
    assert {tensor.device.type for tensor in (*gates.parameters(), *gates.buffers())} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_step_in_any_dtype_keeps_float32_state(dtype):
    model, gates = gated(dtype=dtype)
    backward(model, token_batch(), gates.resource_loss())
    gates.update_importance_()
    assert gates.prune_ratio.grad.dtype == torch.float32
    assert all(torch.isfinite(gates.raw_importance(n)).all() and gates.raw_importance(n).any() for n in DIMS)
    assert {gates.raw_importance(name).dtype for name in DIMS} == {torch.float32}
    assert gates.resource().dtype == torch.float32


def test_ratios_are_one_flat_vector_one_per_dim_or_per_layer():
    _, gates = gated()
    assert gates.prune_ratio.shape == (3 + 3 + 1 + 1,)
    assert [len(gates.ratio(name)) for name in DIMS] == [3, 3, 1, 1]
    _, gates = gated(layout="uniform")
    assert gates.prune_ratio.shape == (4,)
    assert [len(gates.ratio(name)) for name in DIMS] == [3, 3, 1, 1]
    assert len(set(gates.ratio("mlp").tolist())) == 1


def test_search_state_survives_a_round_trip():
    model, gates = gated()
    backward(model, token_batch())
    gates.update_importance_()
    _, other = gated(seed=9)
    other.load_search_state_(copy.deepcopy(gates.search_state()))
    assert bit_equal(other.search_state(), gates.search_state())
    assert other.num_updates == gates.num_updates == 4


def test_the_state_of_another_search_is_an_error_and_changes_nothing():
    _, gates = gated()
    before = copy.deepcopy(gates.search_state())
    _, uniform = gated(layout="uniform")
    with pytest.raises(ValueError, match=r"prune_ratio has shape \(4,\), expected shape \(8,\).* another layout"):
        gates.load_search_state_(uniform.search_state())
    _, fewer = gated(prune=("mlp", "hidden"))
    with pytest.raises(ValueError, match=r"search state: importance_kv is missing, expected shape .*over other dims"):
        gates.load_search_state_(fewer.search_state())
    assert bit_equal(gates.search_state(), before)


# ---- ratios ----
def test_ratios_are_clamped_to_what_protection_allows():
    protect = {"min": {"mlp": 5}, "max": {"mlp": 15, "kv": 2}, "layers": [1]}
    model, gates = gated(protect=protect)
    for value in (-3.0, 3.0):
        with torch.no_grad():
            gates.prune_ratio.fill_(value)
        model.train()
        model(**token_batch())
        assert bool((gates.prune_ratio >= 0).all() and (gates.prune_ratio < 1).all())
        mlp, kv = ((15, 2) if value < 0 else (5, 1)), gates.ratio("kv")
        assert torch.allclose(gates.ratio("mlp") * 20, torch.tensor([20.0 - mlp[0], 0.0, 20.0 - mlp[0]]))
        assert gates.learned_units("mlp").tolist() == [mlp[0], 20, mlp[0]]
        assert torch.allclose(kv * 3, torch.tensor([3.0 - mlp[1], 0.0, 3.0 - mlp[1]]))
        assert int(gates.learned_units("layers")) == (3 if value < 0 else 1)


def test_ratios_start_where_nothing_is_pruned():
    _, gates = gated(search=False)
    assert gates.prune_ratio.abs().max() == 0
    assert gates.resource() == 1
    _, gates = gated(search=False, round_to={"mlp": 8})
    assert gates.hard_units("mlp").tolist() == [16, 16, 16]  # 20 is no multiple of 8


# ---- masks and importance against plain autograd ----
def plain_masked_model(masks, monkeypatch):
    """The same model, masked by plain multiplications; `masks` has one leaf per dim, `[rows, units]`."""
    model = tiny_llama(dtype=torch.float64).train()

    def norm_forward(self, x):
        mask = masks["hidden"][0]
        variance = (mask * x.square()).sum(-1, keepdim=True) / mask.sum()
        return mask * self.weight * x * torch.rsqrt(variance + self.variance_epsilon)

    def expand(mask, each):
        return mask[:, None].expand(-1, each).reshape(-1)

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: (args[0] * masks["mlp"][i],))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: (args[0] * expand(masks["kv"][i], 8),))
        layer.register_forward_hook(lambda _, args, out, i=i: args[0] + masks["layers"][0, i] * (out - args[0]))
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_forward)
    return model


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_importance_and_gradients_are_those_of_plain_autograd(layout, monkeypatch):
    model, gates = gated(dtype=torch.float64, layout=layout)
    before, batch = importances(gates), token_batch()
    loss = backward(model, batch)
    gates.update_importance_()
    ratios = gates.prune_ratio.detach().clone().requires_grad_()
    per_dim = dict(zip(DIMS, ratios.split([dim.num_ratios for dim in gates.dims.values()])))
    masks = {}
    for name, dim in gates.dims.items():
        masks[name] = soft_topk_mask(before[name], per_dim[name].expand(dim.rows), dim.steepness)
        masks[name].retain_grad()
    plain = plain_masked_model(masks, monkeypatch)
    plain_loss = backward(plain, batch)
    assert abs(float(loss - plain_loss)) < 1e-6  # masks are float32: exp(log m) differs from m by rounding
    for name, mask in masks.items():
        term = (mask.detach() * mask.grad).square()
        expected = 0.99 * before[name] + 0.01 * term
        assert relative_difference(gates.raw_importance(name) - 0.99 * before[name], 0.01 * term) < 1e-3  # cancels
        assert relative_difference(gates.raw_importance(name), expected) < 1e-6
        assert float(term.max()) > 0
    assert relative_difference(gates.prune_ratio.grad, ratios.grad) < 1e-4
    for name, parameter in plain.named_parameters():
        assert relative_difference(model.get_parameter(name).grad, parameter.grad) < 1e-5


def test_importance_starts_at_zero_and_is_a_moving_average():
    model, gates = gated(search=False, importance_decay=0.75)
    assert not any(gates.raw_importance(name).any() for name in DIMS)
    terms = []
    for seed in range(2):
        backward(model, token_batch(seed=seed))
        terms.append({name: gates._taylor[name].square() for name in DIMS})
        gates.update_importance_()
    for name in DIMS:
        expected = 0.75 * 0.25 * terms[0][name] + 0.25 * terms[1][name]
        assert relative_difference(gates.raw_importance(name), expected) < 1e-6


def test_a_step_without_a_backward_pass_in_training_mode_is_not_counted():
    model, gates = gated(search=False)
    message = r"no backward pass went through the model in training mode .* call model.train\(\) before the loop"
    for mode in (model.eval(), None):  # evaluation mode, as from_pretrained returns it; and no backward pass
        if mode is not None:
            loss = model(**token_batch(), labels=token_batch()["input_ids"]).loss
            loss.backward()
        gates.step_terms()  # several processes would average these
        with pytest.raises(ValueError, match=message):
            gates.update_importance_()
    assert gates.num_updates == 0
    backward(model, token_batch())  # in training mode
    gates.update_importance_()
    with pytest.raises(ValueError, match=message):
        gates.update_importance_()
    assert gates.num_updates == 1


def test_importance_takes_the_average_over_processes():
    model, gates = gated(search=False)
    backward(model, token_batch())
    twin = copy.deepcopy(gates._taylor)
    for term in gates.step_terms():
        term /= 2
    gates.update_importance_()
    assert torch.allclose(gates.raw_importance("mlp"), 0.01 * (twin["mlp"] / 2).square())


def test_every_process_has_the_same_terms_to_average_even_without_a_backward_pass():
    _, gates = gated()
    shapes = [gates.raw_importance(name).shape for name in gates.dims] + [gates.prune_ratio.shape]
    assert [term.shape for term in gates.step_terms()] == shapes


def test_a_step_that_is_not_taken_leaves_no_trace_in_the_importance():
    model, gates = gated(search=False)
    backward(model, token_batch())
    gates.forget_step_()
    with pytest.raises(ValueError, match="no backward pass"):
        gates.update_importance_()
    assert not any(gates.raw_importance(name).any() for name in DIMS)


def test_soft_units_are_those_between_open_and_closed():
    model, gates = gated(search=False, sharpness=1.0)
    assert gates.soft_fraction("mlp") == 0  # in the warm-up all units are open
    search_(model, ratios=(0.5, 0.5))
    # sigmoid of -2.5, -1.5, ... 2.5 is between 0.05 and 0.95, that of ±3.5 is not: 6 of 20
    assert float(gates.soft_fraction("mlp")) == pytest.approx(0.3)


@pytest.mark.parametrize("warming_up", [False, True])
def test_importance_does_not_depend_on_resource_weight(warming_up):
    found = []
    for weight in (0.0, 100.0):
        model, gates = gated(resource_weight=weight)
        with torch.no_grad():
            gates.prune_ratio.mul_(0.2)  # well above the target
        if warming_up:
            gates.num_updates = 0
        backward(model, token_batch(), gates.resource_loss())
        gates.update_importance_()
        found.append((importances(gates), gates.prune_ratio.grad))
    assert bit_equal(found[0][0], found[1][0])
    if not warming_up:
        assert not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("warming_up", [False, True])
def test_micro_batches_add_up_to_the_batch(warming_up):
    batch = token_batch(4)
    results = []
    for parts in (1, 2, 4):
        model, gates = gated(dtype=torch.float64)
        if warming_up:
            gates.num_updates = 0
        model.train()
        for rows in torch.arange(4).chunk(parts):
            piece = {name: tensor[rows] for name, tensor in batch.items()}
            (model(**piece, labels=piece["input_ids"], use_cache=False).loss / parts).backward()
        grad = gates.prune_ratio.grad
        gates.update_importance_()
        results.append((grad, importances(gates)))
    for grad, importance in results[1:]:
        assert warming_up or relative_difference(grad, results[0][0]) < 1e-5
        for name, values in importance.items():
            assert relative_difference(values, results[0][1][name]) < 1e-5


# ---- warm-up ----
def test_warm_up_computes_the_dense_model_and_gathers_importance():
    model, gates = gated(dtype=torch.float64)
    for name in DIMS:
        gates.raw_importance(name).zero_()
    gates.num_updates = 0
    batch = token_batch()
    plain = tiny_llama(dtype=torch.float64).train()
    expected = backward(plain, batch)
    for step in range(3):
        assert gates.is_warming_up
        assert gates.target(progress=1.0) == 1.0
        loss = backward(model, batch)
        assert all((torch.stack(rows) == 0).all() for rows in gates.log_masks.values())  # log m = 0: every m is 1
        assert abs(float(loss - expected)) < 1e-6  # the stock norm computes in float32
        assert gates.prune_ratio.grad is None
        gates.update_importance_()
        assert gates.num_updates == step + 1
    assert all((gates.raw_importance(name) > 0).all() for name in DIMS)
    assert not gates.is_warming_up
    backward(model, batch)
    assert gates.prune_ratio.grad.abs().min() > 0


def test_the_first_soft_masks_of_open_gates_are_almost_open():
    _, gates = gated(search=False, warmup_steps=0)
    gates.train()
    gates.compute_masks_()
    for name, dim in gates.dims.items():
        missing = (1 - torch.stack(gates.log_masks[name]).exp()).sum(-1)
        assert (missing < 0.09 + 0.003 * dim.units).all()


# ---- what evaluation and the resource see ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_hard_masks_keep_what_the_cut_keeps(layout):
    model, gates = gated(layout=layout)
    plan = plan_of(model)
    model.eval()
    model(**token_batch())
    sizes = gates.hard_sizes()
    for name in DIMS:
        mask = torch.stack(gates.log_masks[name]).exp()
        assert torch.equal(mask.sum(-1).double(), sizes[name])
        assert [row.nonzero().flatten().tolist() for row in mask] == [row.tolist() for row in plan.kept[name]]
    assert gates.log_masks["mlp"][0].requires_grad is False
    assert float(gates.resource(sizes)) == pytest.approx(float(gates.count(sizes)) / gates.dense_resource)


def test_the_soft_resource_meets_the_hard_one_at_whole_sizes_and_falls_with_every_ratio():
    _, gates = gated()
    with torch.no_grad():
        for (_, dim), ratio in zip(gates.dims.items(), gates.prune_ratio.split([3, 3, 1, 1])):
            ratio.copy_((ratio * dim.units).round() / dim.units)
    learned = gates.dense_sizes() | {name: gates.learned_units(name).double() for name in gates.dims}
    assert float(gates.resource().detach()) == pytest.approx(float(gates.resource(learned)), rel=1e-5)
    kept = gates.importance("layers")[0].topk(int(gates.learned_units("layers"))).indices.tolist()
    gates.resource().backward()
    for row in range(3):
        assert (gates.prune_ratio.grad[[row, 3 + row]] < 0).all() == (row in kept)
    assert (gates.prune_ratio.grad[6:] < 0).all()


def test_another_resource_is_counted_at_sizes_too():
    model, gates = gated(resource="macs", sequence_length=7)
    params, dense = build_cost(gates.attachment.bound, model, "params", "model", None), tiny_llama().num_parameters()
    assert float(gates.count(gates.dense_sizes(), params)) == dense
    assert float(gates.count(gates.dense_sizes())) == gates.dense_resource != dense


def test_the_resource_loss_weighs_log_of_resource_over_the_falling_target():
    _, gates = gated(resource_weight=3.0, target_ramp=0.5)
    for progress in (0.0, 0.2, 1.0):
        target = scheduled_target(0.5, progress, 0.5)
        assert gates.target(progress) == target
        expected = 3.0 * F.relu(torch.log(gates.resource() / target))
        assert torch.allclose(gates.resource_loss(progress), expected)
    assert gates.resource_loss(0.0) == 0


def test_a_dim_that_follows_another_keeps_its_share_in_every_row():
    dims = [
        GatedDim("stream", 1, 4, 4.0, True, (1,), (4,)),
        GatedDim("inner", 3, 8, 4.0, True, (1,) * 3, (8,) * 3, follows="stream"),
    ]
    schedule = SearchSchedule(0.5, 0, 0.99, 0.0, 0.7, "geometric", 1.0, 0.85)
    gates = Gates(dims, {}, Cost({("stream",): 1.0}, {}), schedule)
    with torch.no_grad():
        gates.prune_ratio.fill_(0.25)
    assert gates.hard_sizes()["inner"].tolist() == [6, 6, 6]
    assert gates.soft_sizes()["inner"].tolist() == [6, 6, 6]
    assert gates.following_units("inner", torch.tensor([[2], [3]])).tolist() == [[4] * 3, [6] * 3]


def test_protected_layers_rank_above_all_others():
    _, gates = gated(protect={"layers": [-1]})
    importance = gates.importance("layers")[0]
    assert importance[2] == torch.inf
    assert torch.isfinite(importance[:2]).all()
    assert torch.isfinite(gates.raw_importance("layers")).all()


def test_a_step_of_the_search_mixes_no_devices():
    """The meta device, like a GPU, refuses to mix its tensors with those of the CPU."""
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.5, warmup_steps=0, layout="per_layer", protect={"layers": [0]}))
    gates = gates_of(model)
    model.to("meta").train()
    assert {tensor.device.type for terms in gates.cost.stacks.values() for tensor in terms.values()} == {"meta"}
    loss = model(input_ids=torch.ones(1, 4, dtype=torch.long, device="meta")).logits.sum() + gates.resource()
    loss.backward()
    assert gates.prune_ratio.grad.device.type == "meta"
