"""Choices, searches, refits and cuts run on an accelerator, with the same results as on the CPU.

Skipped where torch sees no accelerator. Strategies with random numbers draw others there, so only their budget is
checked.
"""

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.searches import arguments, dms
from helpers.tiny import Tokens, relative_difference, tiny_llama, token_batch
from transformers import AutoModelForCausalLM

from hf_dms import DMSConfig, DMSTrainer, attach_, detach_, one_shot_obs_plan, plan_of, prune, repair_, save_pruned
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.cut.slicing import cut
from hf_dms.experiment.compare import read_rows
from hf_dms.gating.attach import gates_of
from hf_dms.gating.outcome import search_outcome
from hf_dms.strategies.one_shot import CRITERIA, choose_

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(ACCELERATOR is None, reason="torch sees no accelerator on this machine")

DRAWS = ("element_selection", "hard_concrete", "number_selection", "one_shot", "projected", "zero_shot")
DIMS = {"layer": ("kv", "mlp"), "depth": ("layers",), "model": ("hidden",)}


def labelled(count=4):
    batches = [token_batch(seed=seed) for seed in range(count)]
    return [batch | {"labels": batch["input_ids"]} for batch in batches]


def chosen(name, device, dims, layout="per_layer"):
    """A model on a device after a choice, and the model cut from it."""
    model = tiny_llama().to(device)
    attach_(model, DMSConfig(target=0.75, layout=layout, prune=dims))
    choose_(model, name, labelled())
    return model, prune(model)


def searched(folder, device, **options):
    """A trainer that has run on a device. A process otherwise chooses its device once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = DMSTrainer(
        model=tiny_llama(),
        dms_config=dms(prune=("kv", "mlp"), pipeline="p-", **options),
        args=arguments(folder, use_cpu=device == "cpu", max_steps=8, save_strategy="steps", save_steps=4),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=1),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_strategy_chooses_the_sizes_it_chooses_on_the_cpu(name, layout):
    dims = [dim for kind in CRITERIA[name].dims for dim in DIMS.get(kind, ())]
    model, pruned = chosen(name, ACCELERATOR, dims, layout)
    assert pruned.device.type == ACCELERATOR.type
    assert search_outcome(model)["cut"] <= 0.75
    if name not in DRAWS:
        expected, _ = chosen(name, "cpu", dims, layout)
        assert plan_of(model).sizes == plan_of(expected).sizes


@pytest.mark.parametrize("options", [{}, {"scales": "norms", "kl_weight": 0.5}, {"search_over": "refitted"}])
def test_a_search_is_evaluated_resumed_cut_repaired_and_saved(options, tmp_path):
    trainer = searched(tmp_path / "search", ACCELERATOR, **options)
    soft, hard = trainer.soft_and_cut_loss()
    assert soft > 0
    assert hard > 0
    assert trainer.model.device.type == ACCELERATOR.type
    ratios, plan = gates_of(trainer.model).prune_ratio.detach().cpu(), plan_of(trainer.model)
    pruned = trainer.prune()
    repair_(pruned, trainer.model, None, labelled(), epochs=2)
    save_pruned(pruned, tmp_path / "pruned")
    detach_(trainer.model)

    resumed = DMSTrainer(
        model=tiny_llama(), dms_config=trainer.dms_config, args=trainer.args, train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=1),
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "search" / "checkpoint-4"))
    assert relative_difference(gates_of(resumed.model).prune_ratio.cpu(), ratios) < 1e-4

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    batch = token_batch(seed=7)
    there = pruned(**{name: value.to(ACCELERATOR) for name, value in batch.items()}).logits.cpu()
    assert relative_difference(reloaded(**batch).logits, there) < 1e-4

    on_cpu = searched(tmp_path / "cpu", "cpu", **options)
    assert relative_difference(ratios, gates_of(on_cpu.model).prune_ratio) < 1e-3
    assert plan.sizes == plan_of(on_cpu.model).sizes
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_shot_obs_keeps_the_units_that_it_keeps_on_the_cpu():
    plans = []
    for device in ("cpu", ACCELERATOR):
        model = tiny_llama().to(device)
        config = DMSConfig(target=0.7, prune=("kv", "mlp"), layout="per_layer")
        plans.append(one_shot_obs_plan(model, config, labelled()))
        pruned = cut(model, bind(spec_for(model.config), model), plans[-1], "per_layer")
        repair_(pruned, model, plans[-1], labelled())
    assert plans[0].sizes == plans[1].sizes
    assert all(map(torch.equal, plans[0].kept["mlp"], plans[1].kept["mlp"]))


def test_a_comparison_runs_there_and_its_rows_name_the_accelerator(recipe):
    strategies = "{dms: {}, dms-refitted: {dms: {search_over: refitted}}, taylor: {}, scaled: {}, kfac_obs: {}}"
    code, out = recipe(
        f"compare.strategies={strategies}", "compare.targets=[0.7]", "dms.prune=[mlp]", "dms.pipeline=p-",
        "dms.layout=per_layer", "train.use_cpu=false",
        "recover={repair: {examples: 4}, max_steps: 2, distillation: {weight: 0.5, temperature: 2.0}}",
        command="compare",
    )  # fmt: skip
    rows = read_rows(out / "rows.jsonl")
    assert code == 0
    assert len(rows) == 5
    assert all(row["machine"]["accelerator"] for row in rows)
    assert all(row["peak_device_bytes"] > 0 for row in rows)


def test_a_recipe_runs_there_from_search_to_report(recipe):
    code, out = recipe("train.use_cpu=false", "recover={max_steps: 2, repair: {examples: 4}}")
    assert code == 0
    assert (out / "dms_report.json").is_file()
