"""The plans that a search passes are kept in a small file, and models can be cut by them."""

import json

import pytest
import torch
from helpers.searches import trained

from hf_dms.cut.plan import Plan
from hf_dms.cut.plans import PLANS_FILE, levels_above, load_plan_at, load_plans, plans_to_json
from hf_dms.cut.prune import cut_to
from hf_dms.cut.slicing import cut
from hf_dms.gating.attach import gates_of

SEARCH = dict(pipeline="p-", target=0.7, warmup_steps=1, target_ramp=1.0)


def same(plan, other):
    return plan.kept.keys() == other.kept.keys() and all(
        torch.equal(a, b) for name in plan.kept for a, b in zip(plan.kept[name], other.kept[name], strict=True)
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("searched"), SEARCH, max_steps=20)


def test_levels_are_every_twentieth_above_the_target():
    assert levels_above(0.7) == [0.95, 0.9, 0.85, 0.8, 0.75]
    assert levels_above(0.74) == [0.95, 0.9, 0.85, 0.8, 0.75]
    assert levels_above(0.95) == levels_above(1.0) == []
    assert len(levels_above(0.01)) == 19


def test_a_plan_is_kept_at_every_level_and_each_cut_is_just_within_it(searched):
    plans, gates = searched.kept_plans.plans, gates_of(searched.model)
    assert list(plans) == levels_above(0.7)
    before = 1.0
    for level, plan in plans.items():
        sizes = {name: torch.tensor(units) for name, units in plan.sizes.items()}
        share = float(gates.resource(gates.dense_sizes() | sizes))
        assert level - 0.05 < share <= level
        assert share < before
        before = share
        pruned = cut(searched.model, gates.attachment.bound, plan, "per_layer")
        assert pruned.num_parameters() == int(gates.count(gates.dense_sizes() | sizes))


def test_plans_survive_their_file_which_is_small(searched, tmp_path):
    plans, bound = searched.kept_plans.plans, gates_of(searched.model).attachment.bound
    text = plans_to_json(plans, bound, "per_layer")
    (tmp_path / PLANS_FILE).write_text(text)
    found, layout = load_plans(tmp_path, bound)
    assert layout == "per_layer"
    assert list(found) == list(plans)
    assert all(same(found[level], plan) for level, plan in plans.items())
    assert same(load_plan_at(tmp_path / PLANS_FILE, bound, 0.85)[0], plans[0.85])
    assert len(text) < 1500 * len(plans)
    with pytest.raises(ValueError, match=r"has no plan at 0\.7\. It has 0\.95, 0\.9, 0\.85, 0\.8, 0\.75\."):
        load_plan_at(tmp_path, bound, 0.7)


def test_plans_of_before_an_interruption_are_still_there(searched, tmp_path):
    steps = dict(max_steps=20, save_strategy="steps", save_steps=8)
    trained(tmp_path, SEARCH, **steps)
    again = trained(tmp_path, SEARCH, resume=str(tmp_path / "checkpoint-8"), **steps)
    assert list(again.kept_plans.plans) == levels_above(0.7)
    assert all(same(again.kept_plans.plans[level], plan) for level, plan in searched.kept_plans.plans.items())


def test_a_plan_has_the_scales_of_its_time_and_is_cut_with_them(tmp_path):
    trainer = trained(tmp_path, SEARCH | dict(scales="norms"), max_steps=20)
    plans, gates = trainer.kept_plans.plans, gates_of(trainer.model)
    bound, now = gates.attachment.bound, {name: scales.clone() for name, scales in gates.scales.items()}
    (tmp_path / PLANS_FILE).write_text(plans_to_json(plans, bound, "per_layer"))
    found, _ = load_plans(tmp_path, bound)
    for level, plan in plans.items():
        assert plan.log_scales.keys() == {"kv", "mlp", "norms.hidden"}
        for name, rows in plan.log_scales.items():
            assert all(torch.equal(a, b) for a, b in zip(found[level].log_scales[name], rows, strict=True))
    earlier, later = (torch.cat([*plans[level].log_scales["mlp"]]).abs().mean() for level in (0.95, 0.75))
    assert 0 < earlier < later
    pruned = cut_to(trainer.model, plans[0.8])  # compares the outputs too
    assert all(torch.equal(gates.scales[name], scales) for name, scales in now.items())
    plain = cut(trainer.model, bound, Plan(plans[0.8].kept), "per_layer")
    assert not torch.equal(pruned.model.layers[0].mlp.down_proj.weight, plain.model.layers[0].mlp.down_proj.weight)


def test_a_target_that_does_not_fall_passes_nothing(tmp_path):
    for options in (dict(target_schedule="constant"), dict(target=0.97)):
        assert trained(tmp_path, SEARCH | options).kept_plans.plans == {}


def test_uniform_plans_are_those_of_a_stock_model(tmp_path):
    trainer = trained(tmp_path, SEARCH | dict(layout="uniform"), max_steps=20)
    assert trainer.kept_plans.plans
    for plan in trainer.kept_plans.plans.values():
        assert len(set(plan.sizes["mlp"])) == 1


# ---- mistakes in the file ----
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"model_type": "bert"}, "is for a bert model, this one is a llama"),
        (lambda content: content | {"format": 9}, "has format 9"),
        (lambda content: content | {"units": content["units"] | {"mlp": 21}}, "of mlp"),
        (lambda content: content | {"plans": {"0.9": {"mlp": ["%%", "AAAA", "AAAA"]}}}, "is not base64"),
        (lambda content: content | {"plans": {"0.9": {"mlp": ["AAAA", "AAAA", "AAAA"]}}}, "mlp keeps no unit"),
        (lambda content: content | {"plans": {"0.9": {"mlp": ["AA==", "AA==", "AA=="]}}}, "has 8 bits for 20 units"),
        (lambda content: content | {"plans": {"ninety": {}}}, "is not what this hf_dms writes"),
        (lambda content: content | {"plans": {"0.9": {"odd": ["AAAA"]}}}, "24 bits for 0 units"),
    ],
)
def test_a_file_that_is_not_for_the_model_is_refused(searched, tmp_path, change, message):
    bound = gates_of(searched.model).attachment.bound
    content = json.loads(plans_to_json(searched.kept_plans.plans, bound, "per_layer"))
    (tmp_path / PLANS_FILE).write_text(json.dumps(change(content)))
    with pytest.raises(ValueError, match=message):
        load_plans(tmp_path, bound)


def test_a_folder_without_plans_is_named(tmp_path, searched):
    with pytest.raises(ValueError, match=r"There is no '.*dms_plans.json'"):
        load_plans(tmp_path, gates_of(searched.model).attachment.bound)


# ---- the command ----
def test_a_size_that_a_search_passed_is_cut_from_the_files(recipe, dense, tmp_path, capsys):
    from hf_dms.cli import main

    options = ("dms.pipeline=p-", "dms.target=0.7", "dms.target_ramp=1.0", "dms.warmup_steps=1", "train.max_steps=20")
    code, out = recipe(*options)
    assert code == 0
    smaller = tmp_path / "at-0.9"
    ask = ["prune", "--plan", str(out), "--at", "0.9", f"model.path={dense}", f"output.path={smaller}"]
    assert main(ask) == 0
    report = json.loads((smaller / "dms_report.json").read_text())
    sizes = [json.loads((folder / "dms_report.json").read_text())["pruned"]["num_params"] for folder in (out, smaller)]
    assert sizes[0] < sizes[1] <= 0.9 * report["dense"]["num_params"]
    assert (smaller / "dms_plan.json").is_file()
    capsys.readouterr()
    assert main([*ask[:4], "0.5", *ask[5:], "output.overwrite=true"]) == 2
    assert "has no plan at 0.5. It has 0.95, 0.9" in capsys.readouterr().err
    assert recipe("--at=0.9")[0] == 2
    assert "--at is for --plan FOLDER" in capsys.readouterr().err
