"""A search over refitted weights: what runs in training, what does not change, and exact resuming."""

import pytest
import torch
from helpers.laws import tiny
from helpers.refit import batches_for, bound_of, labelled_batches
from helpers.searches import Images, arguments, bit_equal, dms, logged, stories, trained
from helpers.tiny import Tokens, relative_difference, tiny_llama, trace
from transformers import BertForMaskedLM, LlamaForCausalLM, ViTForImageClassification

from hf_dms import DMSConfig, DMSTrainer, attach_, detach_, plan_of, prune
from hf_dms.cut.verify import hard_masked, outputs_of
from hf_dms.gating.attach import gates_of
from hf_dms.refit.levels import sweep
from hf_dms.refit.search import RefittedSearch
from hf_dms.training.refitting import examples_to_refit_on, refresh_steps

CLASSES = (LlamaForCausalLM, BertForMaskedLM, ViTForImageClassification)


def with_search(cls, **options):
    """A model with gates in a refitted search. All its dims are widths of layers."""
    model = tiny(cls)
    dims = tuple(dim.name for dim in bound_of(model).spec.dims if dim.scope == "layer")
    config = dict(target=0.7, prune=dims, layout="per_layer", pipeline="p-", search_over="refitted", warmup_steps=0)
    attach_(model, DMSConfig(**(config | options)))
    model.requires_grad_(False)
    gates_of(model).prune_ratio.requires_grad_(True)
    return model, RefittedSearch(model, labelled_batches(model, batches=4))


def soft_outputs(model, inputs):
    model.eval()
    gates_of(model).train()
    try:
        return outputs_of(model, inputs)
    finally:
        gates_of(model).eval()


# ---- what runs ----
@pytest.mark.parametrize("cls", CLASSES)
def test_at_ratio_0_it_is_the_dense_model(cls):
    model, search = with_search(cls)
    batch = batches_for(model, seed=2)[0]
    dense = outputs_of(tiny(cls), batch)
    search.refresh_()
    assert relative_difference(soft_outputs(model, batch), dense) < 1e-3


@pytest.mark.parametrize("cls", CLASSES)
def test_the_refit_of_a_width_is_nearer_to_the_dense_model_than_its_mask(cls):
    model, search = with_search(cls)
    gates, batches = gates_of(model), batches_for(model, seed=2)
    whole = [torch.full((3,), 1 - round(0.6 * dim.units) / dim.units) for dim in gates.dims.values()]
    gates.prune_ratio.data.copy_(torch.cat(whole))
    search.refresh_()
    dense = tiny(cls)

    def error(outputs):
        return sum(float((outputs(model, b) - outputs_of(dense, b)).square().mean()) for b in batches)

    assert error(soft_outputs) < error(outputs_of)  # `outputs_of` has hard masks, with units in the same order


@pytest.mark.parametrize("cls", CLASSES)
def test_the_gradient_of_every_ratio_is_that_of_the_loss_of_the_refitted_model(cls):
    model, search = with_search(cls)
    gates, batch = gates_of(model), labelled_batches(model, batches=1)[0]
    gates.prune_ratio.data.fill_(0.27)  # between two levels of every dim, where the slope is one
    search.refresh_()

    def loss():
        model.eval()
        gates.train()
        return model(**batch).loss

    loss().backward()
    gradient = gates.prune_ratio.grad.clone()
    assert (gradient != 0).all()
    for place in (0, len(gradient) - 1):
        step, moved = 5e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                gates.prune_ratio[place] += sign * step
                moved.append(float(loss()))
                gates.prune_ratio[place] -= sign * step
        assert float(gradient[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.1, abs=2e-3)


def test_in_evaluation_mode_hard_masks_and_the_model_s_own_weights_run():
    model, search = with_search(LlamaForCausalLM)
    gates, batch = gates_of(model), batches_for(model)[0]
    gates.prune_ratio.data.fill_(0.4)
    search.refresh_()
    importance = {name: gates.raw_importance(name).clone() for name in gates.dims}
    found = outputs_of(model.eval(), batch)
    other = tiny(LlamaForCausalLM)
    attach_(other, gates.attachment.config)
    gates_of(other).load_search_state_(gates.search_state())
    with hard_masked(other, {name: gates.hard_units(name) for name in gates.dims}):
        assert torch.equal(found, outputs_of(other, batch))
    assert all(torch.equal(gates.raw_importance(name), value) for name, value in importance.items())


def test_it_can_be_cut_and_the_gates_come_off_without_a_trace():
    model, reference = tiny(LlamaForCausalLM), tiny(LlamaForCausalLM)
    before = trace(model)
    config = DMSConfig(target=0.7, prune=("kv", "mlp"), layout="per_layer", pipeline="p-", search_over="refitted")
    attach_(model, config)
    search = RefittedSearch(model, labelled_batches(model, batches=2))
    search.refresh_()
    search.refresh_()
    gates_of(model).num_updates = 8
    assert prune(model).num_parameters() < reference.num_parameters()
    detach_(model)
    assert trace(model) == before


def test_hidden_and_layers_keep_their_masks():
    model, search = with_search(LlamaForCausalLM, prune=("mlp", "hidden", "layers"))
    gates = gates_of(model)
    gates.num_updates = 1
    search.refresh_()
    gates.train()
    gates.compute_masks_()
    assert gates.refitted == {"mlp"}
    assert gates.log_masks["mlp"] == (None, None, None)
    assert gates.log_masks["hidden"][0].shape == (24,)


@pytest.mark.parametrize("cls", CLASSES)
def test_units_are_chosen_for_the_sizes_of_the_cut(cls):
    """The order comes from a walk at these sizes. It differs from that at open ratios, whatever came before."""
    model, search = with_search(cls)
    gates, batches = gates_of(model), labelled_batches(model, seed=3)
    search.refresh_()
    at_open = {name: gates.raw_importance(name).clone() for name in gates.dims}
    sizes = {name: torch.tensor([dim.units, 1, 2]) for name, dim in gates.dims.items()}
    search.choose_units_(sizes, batches)
    chosen = {name: gates.raw_importance(name).clone() for name in gates.dims}
    assert any(not torch.equal(chosen[name], at_open[name]) for name in gates.dims)
    gates.prune_ratio.data.fill_(0.3)
    search.refresh_()
    search.choose_units_(sizes, batches)
    assert all(torch.equal(gates.raw_importance(name), chosen[name]) for name in gates.dims)
    detach_(model)
    widths = {name: sizes[name] for name in chosen}
    for (layer, _), refitted in sweep(model, bound_of(model), batches, search.factors, widths).items():
        assert torch.equal(chosen[refitted.dim][layer].argsort(descending=True), refitted.elimination.order)


# ---- in the trainer ----
REFITTED = dict(
    prune=("kv", "mlp"), pipeline="p-", search_over="refitted", warmup_steps=0, resource_scope="layers", target=0.7
)


def test_a_trainer_searches_over_refitted_weights_to_its_target(tmp_path):
    trainer = trained(tmp_path, REFITTED | {"gate_learning_rate": 0.04}, max_steps=12)
    assert logged(trainer, "resource")[-1] < 0.75
    gates = trainer.gates
    assert gates.refitted == {"kv", "mlp"}
    assert not torch.equal(gates.refit_ratio, gates.prune_ratio)
    before = weights_of_dense()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    trainer.prune()


def test_a_trainer_chooses_the_units_of_the_cut_on_more_examples(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(RefittedSearch, "choose_units_", lambda self, *args: chosen.append(args))
    trainer = trained(tmp_path, REFITTED, max_steps=4)
    ((sizes, batches),) = chosen
    plan = plan_of(trainer.model)
    assert {name: size.tolist() for name, size in sizes.items()} == plan.sizes
    assert len(batches) > len(examples_to_refit_on(trainer))


def weights_of_dense():
    return tiny_llama().state_dict()


def test_resume_equals_uninterrupted(tmp_path):
    whole = trained(tmp_path / "whole", REFITTED, max_steps=9, save_strategy="steps", save_steps=2)
    resumed = trained(
        tmp_path / "resumed", REFITTED, max_steps=9, resume=str(tmp_path / "whole" / "checkpoint-4"),
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    assert bit_equal(resumed.gates.search_state(), whole.gates.search_state())
    assert stories(resumed)[-3:] == stories(whole)[-3:]


def test_refits_are_spread_evenly_over_the_search():
    assert refresh_steps(0, 9) == [0, 3, 6]
    assert refresh_steps(8, 100) == [8, 38, 69]
    assert refresh_steps(0, 1) == [0]


def test_the_examples_to_refit_on_are_always_the_same_and_enough_for_the_widest_map(tmp_path):
    trainer = trained(tmp_path, REFITTED, max_steps=1)
    first, second = (examples_to_refit_on(trainer) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second))
    assert sum(batch["input_ids"].numel() for batch in first) == 128  # 4 × 24 inputs are 96 tokens, 64 a batch


def test_images_can_be_refitted_on(tmp_path):
    options = REFITTED | {"prune": ("heads", "mlp")}
    trainer = DMSTrainer(
        model=tiny(ViTForImageClassification),
        dms_config=dms(**options),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=Images(),
    )
    trainer.train()
    assert trainer.gates.refitted == {"heads", "mlp"}


# ---- errors ----
def test_what_cannot_be_refitted_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"search_over = refitted needs frozen weights, got pipeline p\. Write pipeline: p-"
    ):
        DMSConfig(target=0.5, search_over="refitted")
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.9, prune=("hidden",), pipeline="p-", search_over="refitted"))
    with pytest.raises(ValueError, match=r"refits widths of layers, prune names only hidden\. Add one, or write"):
        RefittedSearch(model, [])


def test_streamed_data_is_an_error(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Tokens())

    trainer = DMSTrainer(
        model=tiny_llama(), dms_config=dms(**REFITTED), args=arguments(tmp_path), train_dataset=Stream()
    )
    with pytest.raises(ValueError, match="refitted needs a dataset with a length and an index, got a Stream"):
        trainer.train()
