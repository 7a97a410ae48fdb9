"""`dms.strategy` chooses units without a search. All other stages of the recipe, and its folder, stay the same."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.laws import tiny
from helpers.schema import mistakes
from helpers.tiny import tiny_llama, token_batch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ResNetForImageClassification,
    TrainingArguments,
    default_data_collator,
)

import hf_dms.experiment.stages as stages
import hf_dms.training.progress as progress
from hf_dms import DMSConfig, DMSTrainer, attach_, choose_, estimate_batch_norms_, plan_of, prune
from hf_dms.experiment.choose import Batches, cut_by_criterion, shuffled
from hf_dms.gating.attach import gates_of
from hf_dms.gating.outcome import search_outcome
from hf_dms.refit.batch_norms import batch_norms
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.generation import load_sequences
from hf_dms.tasks.task import Examples

CUT = ("dms.prune=[kv, mlp]", "dms.layout=per_layer", "dms.target=0.8", "recover.repair={examples: 4}")


def test_a_recipe_with_a_strategy_keeps_the_units_that_it_chooses(recipe, dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    code, out = recipe("dms.strategy=taylor", *CUT)
    assert code == 0
    report = json.loads((out / "dms_report.json").read_text())
    data = DataConfig(path=str(tmp_path / "text.jsonl"), sequence_length=16, held_out=0.2)
    sequences, _ = load_sequences(data, AutoTokenizer.from_pretrained(dense))
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(42))  # TrainingArguments' seed
    batches = [{"input_ids": ids, "labels": ids} for ids in sequences[order][:16].split(2)]  # max_steps 8
    model = AutoModelForCausalLM.from_pretrained(dense)
    attach_(model, DMSConfig(target=0.8, prune=("kv", "mlp"), layout="per_layer", sequence_length=16))
    choose_(model, "taylor", batches)
    assert {name: report["sizes"][name] for name in ("kv", "mlp")} == plan_of(model).sizes
    assert report["search"] == []
    assert "masks" not in report  # soft masks exist in a search only
    assert mistakes(report) == []
    shown = capsys.readouterr().out
    assert "the searched model" not in shown
    assert "choosing: 8 of 8 batches (100 %), 0:00:00 left" in shown
    assert report["pruned"]["num_params"] <= 0.8 * report["dense"]["num_params"]
    assert report["repaired"]["perplexity"] > 0
    card = (out / "README.md").read_text()
    assert "its units chosen by `taylor`, without a search" in card
    assert "taylor" in (out / "report.html").read_text()


@pytest.mark.parametrize("strategy", ["magnitude", "scaled"])
def test_strategies_without_data_and_with_scales_run_too(recipe, dense, strategy, monkeypatch):
    teachers = []
    monkeypatch.setattr(stages, "repair_", lambda pruned, teacher, *rest, **options: teachers.append(teacher))
    code, _ = recipe(f"dms.strategy={strategy}", *CUT, "dms.pipeline=p-")
    assert code == 0
    expected = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    found = teachers[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dms.strategy=tailor"], "There is no criterion 'tailor'"),
        (["dms.strategy=flap", "dms.prune=[mlp, layers]"], "flap is not defined for layers. Prune mlp alone"),
        (["dms.strategy=3"], "dms.strategy must be a text"),
        (["dms.strategy=flap", "dms.pipeline=np"], "dms.pipeline = np has no meaning"),
        (["dms.strategy=flap", "dms.search_over=refitted"], "dms.search_over = refitted has no meaning"),
        (["dms.strategy=taylor", "dms.pipeline=p-", "dms.scales=true"], "taylor learns no masks, and so no scales"),
        (["dms.strategy=flap", "lora={r: 2}"], "lora is for a search, and dms.strategy is flap"),
    ],
)
def test_mistakes_are_one_line_before_a_weight_is_loaded(recipe, capsys, overrides, message):
    code, _ = recipe(*overrides, command="validate")
    assert code == 2
    assert re.search(re.escape(message), capsys.readouterr().err)


def test_where_there_is_a_search_a_strategy_is_refused(tmp_path):
    config = DMSConfig(target=0.8, strategy="flap")
    with pytest.raises(ValueError, match=r"DMSTrainer searches, and dms.strategy is flap"):
        DMSTrainer(model=tiny_llama(), args=TrainingArguments(str(tmp_path), use_cpu=True), dms_config=config)
    with pytest.raises(ValueError, match=r"chooses by weight magnitude, and dms.strategy is flap"):
        prune(tiny_llama(), config)


def test_a_cut_far_below_its_budget_is_no_fault_of_a_search_that_did_not_run():
    """Two of three layers cost a third less than the budget. Advice about rates and steps would not help here."""
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.9, resource_scope="layers", prune=("layers",), strategy="block_influence"))
    choose_(model, "block_influence", [token_batch()])
    outcome = search_outcome(model)
    assert (outcome["verdict"], outcome["message"]) == ("below", "")
    gates_of(model).attachment.config.strategy = "dms"
    assert "Search for more steps" in search_outcome(model)["message"]


def test_batches_are_collated_when_asked_for_and_slices_are_of_the_same_examples():
    seen = []
    rows = [{"input_ids": torch.tensor([place])} for place in range(10)]

    def collate(rows):
        seen.extend(int(row["input_ids"]) for row in rows)
        return {"input_ids": torch.stack([row["input_ids"] for row in rows])}

    examples = Examples(rows, rows, collate, (), "rows")
    batches = Batches(examples, 7, 2)
    assert (len(batches), seen) == (4, [])
    assert [batch["input_ids"].flatten().tolist() for batch in batches[1:3]] == [[2, 3], [4, 5]]
    assert seen == [2, 3, 4, 5]
    mixed = Batches(shuffled(examples, 1), 10, 10)[0]["input_ids"].flatten().tolist()
    assert sorted(mixed) == list(range(10)) != mixed


def test_a_chosen_cut_has_batch_norms_of_its_own():
    rows = [{"pixel_values": torch.full((2, 16, 16), float(index)), "labels": index % 3} for index in range(8)]
    examples = Examples(rows, [], default_data_collator, (), "images")
    model = tiny(ResNetForImageClassification)
    before = [norm.running_mean.clone() for norm in batch_norms(model)]
    recipe = SimpleNamespace(dms=DMSConfig(target=0.8, layout="per_layer", prune=("reduced", "mid")))
    pruned, seen = cut_by_criterion(model, recipe, "magnitude", examples, 8, 4)
    assert seen == 0
    expected = copy.deepcopy(pruned)
    estimate_batch_norms_(expected, Batches(examples, 8, 4))
    for norm, other in zip(batch_norms(pruned), batch_norms(expected)):
        torch.testing.assert_close(norm.running_mean, other.running_mean)
    assert not torch.equal(batch_norms(pruned)[0].running_mean, before[0])  # the stem's, which is not narrower
