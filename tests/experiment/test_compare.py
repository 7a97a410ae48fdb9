"""`hf-dms compare` writes one row per cell as soon as it is finished, gives all cells the same work, and resumes."""

import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_dms.experiment.compare as comparing
from hf_dms.experiment.compare import read_rows
from hf_dms.refit.interpolate import SHARES
from hf_dms.report.comparison import comparison_table, paired_difference
from hf_dms.training.distillation import DistillationConfig

CELLS = [
    "compare.strategies={dms: {}, taylor: {}, random: {}, wanda: {criterion: wanda_sp}}",
    "compare.targets=[0.7]",
    "dms.prune=[mlp]",
    "dms.pipeline=p-",
    "dms.layout=per_layer",
    "recover.repair={examples: 4, interpolate: true}",
]


@pytest.fixture
def table(recipe, tmp_path, capsys):
    def run(*overrides):
        code, out = recipe(*CELLS, *overrides, command="compare")
        captured = capsys.readouterr()
        return code, captured.out, captured.err, read_rows(out / "rows.jsonl")

    return run


def test_every_cell_is_a_row_within_the_budget_on_the_same_examples(table):
    code, out, _, rows = table()
    assert code == 0
    assert [row["cell"]["strategy"] for row in rows] == ["dms", "taylor", "random", "wanda"]
    for row in rows:
        assert row["resource"] <= 0.7
        assert set(row["scores"]) == {"dense", "cut", "repaired"}
        assert row["scores"]["dense"] == rows[0]["scores"]["dense"]
        assert row["seen"]["repaired"] == 4
        assert row["kept_of_repair"] in SHARES
        assert row["versions"]["hf_dms"]
        assert row["machine"]["threads"] >= 1
    assert {row["cell"]["strategy"]: row["seen"]["cut"] for row in rows} == {
        "dms": 16, "taylor": 16, "random": 0, "wanda": 16,
    }  # fmt: skip
    assert "| 0.7 | taylor | 1 |" in out


def test_tokens_are_the_same_for_all_and_repair_is_among_them(table):
    _, out, _, rows = table("compare.tokens=160", "compare.strategies={dms: {}, taylor: {}, kfac_obs: {}}")
    assert "| target | strategy | seeds | tokens |" in out
    for row in rows:
        assert sum(row["seen"].values()) * 16 == row["tokens"] == 160


def test_what_a_search_refits_on_is_counted_and_equalised_too(table):
    refitted = "{search_over: refitted, warmup_steps: 0}"
    strategies = f"compare.strategies={{dms: {{}}, dms-refitted: {{dms: {refitted}}}}}"
    *_, rows = table(strategies, "compare.tokens=1120", "recover=null")
    assert [row["seen"]["cut"] * 16 for row in rows] == [1120, 1120]


def test_a_search_by_the_divergence_from_the_dense_model_is_a_strategy_too(table):
    searches = "{dms: {}, dms-kl: {dms: {kl_weight: 1.0, warmup_steps: 1}}, dms-plain: {dms: {warmup_steps: 1}}}"
    *_, rows = table(f"compare.strategies={searches}", "recover=null")
    assert [row["seen"] for row in rows] == [rows[0]["seen"]] * 3
    assert rows[1]["scores"]["dense"] == rows[2]["scores"]["dense"]
    assert rows[1]["scores"]["cut"] != rows[2]["scores"]["cut"]


def test_a_search_by_epochs_is_a_search_of_whole_epochs_and_rivals_see_as_much(table):
    epochs = ("train.max_steps=-1", "train.num_train_epochs=1", "compare.strategies={dms: {}, taylor: {}}")
    *_, rows = table(*epochs, "recover=null", "dms.warmup_steps=1")
    assert rows[0]["seen"]["cut"] in (rows[1]["seen"]["cut"], rows[1]["seen"]["cut"] - 1)  # a search sees whole batches
    assert rows[1]["seen"]["cut"] > 10


def test_a_target_may_be_an_amount(table, recipe, tmp_path, capsys):
    options = ("dms.target=8K", "compare.targets=[]", "compare.strategies={dms: {}, random: {}}", "recover=null")
    *_, rows = table(*options)
    assert rows[0]["cell"]["target"] == rows[1]["cell"]["target"] < 1
    shutil.rmtree(tmp_path / "out")
    assert recipe("dms.target=8K", "dms.pipeline=p-", command="validate")[0] == 0
    assert f"dms.target: {rows[0]['cell']['target']:.4g} (8K)" in capsys.readouterr().out
    code, out = recipe("dms.target=8K", "dms.pipeline=p-", "dms.prune=[mlp]", "dms.layout=per_layer")
    assert code == 0
    report = json.loads((out / "dms_report.json").read_text())
    assert 0.9 * 8000 < report["pruned"]["num_params"] <= 8000


def test_a_strategy_may_be_trained_for_longer(table):
    strategies = "compare.strategies={random: {}, longer: {criterion: random, recover: {max_steps: 3}}}"
    *_, rows = table(strategies, "recover={max_steps: 2}", "compare.tokens=1600")
    assert [row["seen"]["recovered"] for row in rows] == [4, 6]
    assert rows[0]["scores"]["cut"] == rows[1]["scores"]["cut"]
    assert rows[0]["scores"]["recovered"] != rows[1]["scores"]["recovered"]


def test_a_strategy_may_be_recovered_in_another_way(table, monkeypatch):
    trainings = []

    def seen(model, arguments, examples, teacher, distillation, **options):
        trainings.append((arguments.max_steps, arguments.num_train_epochs, distillation, options["lora"] is not None))

    monkeypatch.setattr(comparing, "train_", seen)
    _, _, _, rows = table(
        "recover.max_steps=2",
        "recover.distillation={weight: 0.5}",
        "compare.strategies={dms: {}, dms-long: {recover: {num_train_epochs: 2}}, dms-labels: {recover: {distillation: "
        "null}}, dms-whole: {recover: {distillation: {weight: 1}, repair: {examples: 2}, lora: {r: 2}}}}",
    )
    half, whole = (DistillationConfig(weight=weight) for weight in (0.5, 1.0))
    assert trainings == [(2, 3.0, half, False), (-1, 2.0, half, False), (2, 3.0, None, False), (2, 3.0, whole, True)]
    assert [row["seen"]["repaired"] for row in rows] == [4, 4, 4, 2]


def test_all_seeds_share_one_fine_tuned_dense_model(table):
    finetuned = ("finetune={max_steps: 3, learning_rate: 0.01}", "compare.strategies={random: {}}", "recover=null")
    *_, rows = table(*finetuned, "compare.seeds=[0, 1]")
    plain = table("compare.strategies={random: {}}", "recover=null")[-1][-1]
    assert rows[0]["scores"]["dense"] == rows[1]["scores"]["dense"]
    assert rows[0]["scores"]["dense"] != plain["scores"]["dense"]
    assert rows[0]["scores"]["cut"] != rows[1]["scores"]["cut"]


def test_a_stopped_table_goes_on_where_it_stopped(table, monkeypatch, tmp_path):
    real = comparing.run_cell

    def stop_at_random(setup, cell):
        if cell.strategy == "random":
            raise KeyboardInterrupt
        return real(setup, cell)

    monkeypatch.setattr(comparing, "run_cell", stop_at_random)
    with pytest.raises(KeyboardInterrupt):
        table()
    rows = tmp_path / "out" / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before + '{"cut off')
    made = []
    monkeypatch.setattr(comparing, "run_cell", lambda setup, cell: made.append(cell.strategy) or real(setup, cell))
    *_, found = table()
    assert made == ["random", "wanda"]
    assert [json.dumps(row) for row in found[:2]] == before.splitlines()
    assert [row["cell"]["strategy"] for row in found] == ["dms", "taylor", "random", "wanda"]


def test_rows_of_other_work_are_not_mixed_in(table):
    *_, rows = table("compare.strategies={taylor: {}}")
    *_, more = table("compare.strategies={taylor: {}}", "recover.repair={examples: 5}")
    assert len(more) == 2
    assert more[0] == rows[0]
    assert more[0]["work"] != more[1]["work"]


@pytest.mark.parametrize("strategies", ["{dms: {}}", "{scaled: {}}"])
def test_what_is_repaired_learns_from_the_dense_model_as_it_was(table, dense, monkeypatch, strategies):
    expected = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    teachers = []
    monkeypatch.setattr(comparing, "repair_", lambda pruned, teacher, *rest, **options: teachers.append(teacher))
    code, *_ = table(f"compare.strategies={strategies}", "dms.pipeline=p", "train.learning_rate=0.01")
    assert code == 0
    found = teachers[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rows_stay_where_the_data_moves_or_an_option_says_its_default(table, recipe, tmp_path):
    *_, rows = table("compare.strategies={taylor: {}}")
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "text.jsonl").write_bytes((tmp_path / "text.jsonl").read_bytes())
    _, _, _, more = table("compare.strategies={taylor: {}}", f"data.path={other}/text.jsonl", "dms.target_ramp=0.7")
    assert len(more) == len(rows) == 1


def test_a_search_with_other_values_is_a_strategy_of_its_own(table):
    strategies = "compare.strategies={dms: {}, dms-forgetful: {dms: {importance_decay: 0.0}}}"
    _, out, _, rows = table(strategies, "recover=null")
    assert rows[1]["cell"]["settings"] == {"dms": {"importance_decay": 0.0}}
    assert "dms-forgetful" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.strategies={}", "compare.strategies is required"),
        ("compare.strategies={tailor: {}}", "compare.strategies.tailor: name a criterion .*taylor"),
        ("compare.strategies={dms: {size: 3}}", "compare.strategies.dms has no key 'size'"),
        ("compare.strategies={x: {criterion: tailor}}", "There is no criterion 'tailor'"),
        ("compare.strategies={dms: 5}", "compare.strategies.dms must be a section with keys, got 5"),
        ("compare.strategies={dms: {train: 5}}", "compare.strategies.dms.train must be a section with keys, got 5"),
        (
            "compare.strategies={dms: {recover: {data: {path: a.jsonl}}}}",
            "compare.strategies.dms.recover.data: all strategies recover on the same data",
        ),
        (
            "compare.strategies={dms: {recover: {distillation: {weigth: 1}}}}",
            "compare.strategies.dms: Unknown key recover.distillation.weigth",
        ),
        ("compare.targets=[60]", "compare.targets must be in"),
        ("compare.seeds=[]", "compare.seeds is empty"),
        ("compare.tokens=16", "less than the repair needs"),
    ],
)
def test_mistakes_are_one_line(table, override, message):
    code, _, err, _ = table(override)
    assert code == 2
    assert re.search(message, err)


def test_a_strategy_that_does_not_exist_is_found_by_validate(recipe, capsys):
    assert recipe("compare.strategies={tailor: {}}", command="validate")[0] == 2
    assert "compare.strategies.tailor: name a criterion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["compare.strategies={random: {}, block_influence: {}}"],
            "block_influence, target 0.7: .*not defined for mlp",
        ),
        (
            ["compare.strategies={dms: {}, magnitude: {dms: {pipeline: p-, scales: true}}}"],
            "compare.strategies.magnitude, target 0.7: dms.strategy = magnitude learns no masks",
        ),
        (["compare.targets=[0.7, 0.01]"], "dms.target = 0.01 cannot be reached"),
        (
            ["compare.strategies={dms: {}, dms-slow: {train: {learning_rte: 1e-4}}}"],
            "compare.strategies.dms-slow, target 0.7: Unknown key train.learning_rte",
        ),
        (
            ["compare.strategies={dms: {}, dms-slow: {recover: {learning_rate: 1e-4}}}"],
            "compare.strategies.dms-slow, target 0.7: recover.max_steps is required",
        ),
    ],
)
def test_a_cell_that_cannot_be_made_is_known_before_the_first_one(table, overrides, message):
    code, _, err, rows = table(*overrides)
    assert code == 2
    assert re.search(message, err)
    assert rows == []


# ---- the table, by hand ----
def row(strategy, seed, losses, target=0.5):
    def scored(values):
        mean = sum(values) / len(values)
        return {"text": {"perplexity": math.exp(mean), "scores": values}}

    scores = {"dense": scored([0.0, 0.0]), "cut": scored(losses)}
    return {"cell": {"strategy": strategy, "target": target, "seed": seed}, "scores": scores, "seen": {"cut": 100}}


def test_differences_are_paired_over_examples_and_averaged_over_seeds():
    first = [row("dms", 0, [1.0, 2.0]), row("dms", 1, [1.0, 2.0])]
    other = [row("taylor", 0, [2.0, 5.0]), row("taylor", 1, [2.0, 3.0])]
    difference, error = paired_difference(other, first, "cut", "text")
    assert difference == pytest.approx(1.5)  # (1, 3) and (1, 1): by example 1 and 2
    assert error == pytest.approx(0.5)
    text = comparison_table(first + other)
    assert "| 0.5 | taylor | 2 | 100 | 1.0 → 22.6 (+1.5 ± 0.5) |" in text


def test_a_table_without_rows_says_so():
    assert comparison_table([]) == "No rows yet."
