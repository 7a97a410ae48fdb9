"""A finished search is never lost: after a change, the same command repeats only the stages that the change affects."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers.marks import ordinary_if
from transformers import Trainer

import hf_dms.experiment.run
from hf_dms.checkpoint.folders import only_writer
from hf_dms.experiment.recipe import build_recipe
from hf_dms.experiment.unfinished import STAGES, influences

WHOLE = {"finetune": 2, "search": 4, "recover": 3}  # steps of each stage
OPTIONS = ["finetune.max_steps=2", "train.max_steps=4", "dms.warmup_steps=1", "recover.max_steps=3"]


@pytest.fixture
def steps(monkeypatch):
    """Training steps per stage since the last `clear`. The stage is known by the folder that a Trainer writes to."""
    count, train = Counter(), Trainer.training_step

    def step(self, *args, **kwargs):
        count[Path(self.args.output_dir).name] += 1
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    return count


@pytest.fixture
def failed(recipe, steps, monkeypatch):
    """A function that runs the recipe of all stages with further options, until its saving fails."""

    def run(*options):
        def fail(*args, **kwargs):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(hf_dms.experiment.run, "save_pruned", fail)
            with pytest.raises(OSError, match="No space left"):
                recipe(*OPTIONS, *options)
        assert steps == {stage: count for stage, count in WHOLE.items() if count}
        steps.clear()

    return run


@pytest.mark.parametrize(
    ("changes", "again"),
    ordinary_if(
        lambda changes, again: changes == ["recover=null"] or "repair" in "".join(changes) or len(changes) > 2,
        [
            ([], []),
            (["recover.learning_rate=0.01"], ["recover"]),
            (["recover.max_steps=2"], ["recover"]),
            (["recover.repair={examples: 2}"], ["recover"]),
            (["recover.distillation={}"], ["recover"]),
            (["recover.lora={r: 2}"], ["recover"]),
            (["recover=null"], []),
            (["eval={examples: 2, batch_size: 1}"], []),
            (["train.logging_steps=1", "train.save_steps=2", "recover.save_steps=1"], []),
            (["output.overwrite=true", "dms.max_nonfinite_steps=7"], []),
        ],
    ),
    ids=lambda value: " ".join(value),
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_what_comes_after_a_finished_search_is_changed_and_the_search_stays(failed, recipe, steps, changes, again):
    failed()
    code, out = recipe(*OPTIONS, *changes)
    assert code == 0
    assert set(steps) == set(again)
    report = json.loads((out / "dms_report.json").read_text())
    assert ("recovered" in report) == (changes != ["recover=null"])
    assert not out.with_name("out.unfinished").exists()


def test_a_training_that_is_added_begins_at_the_finished_search(failed, recipe, steps, monkeypatch):
    monkeypatch.setitem(WHOLE, "recover", 0)
    failed("recover=null")
    assert recipe(*OPTIONS)[0] == 0
    assert steps == {"recover": 3}


@pytest.mark.parametrize("change", ["save_strategy=no", "save_strategy=epoch"])
def test_a_stage_that_saves_no_checkpoints_is_not_done_twice(failed, recipe, steps, change):
    """The dense model of repair and distillation, which is that of the search, is not trained again either."""
    options = [f"train.{change}", "recover.repair={examples: 2}", "recover.distillation={}"]
    failed(*options)
    assert recipe(*OPTIONS, *options)[0] == 0
    assert not steps


def test_of_a_search_for_the_best_checkpoint_that_one_stays(failed, recipe, steps, monkeypatch):
    monkeypatch.setitem(WHOLE, "recover", 0)
    best = ["eval_strategy=steps", "eval_steps=1", "save_steps=1", "load_best_model_at_end=true"]
    options = [*(f"train.{option}" for option in best), "recover=null", "dms.target=0.8", "dms.gate_learning_rate=0.2"]
    failed(*options)
    assert recipe(*OPTIONS, *options)[0] == 0
    assert not steps


@pytest.mark.parametrize(
    ("change", "words", "deleted", "again"),
    ordinary_if(
        lambda change, *_: change in ("dms.target=0.5", "finetune=null"),
        [
            ("dms.target=0.5", "search of another recipe: dms.target was 0.6, is 0.5", "search", ["search", "recover"]),
            ("train.learning_rate=0.01", "train.learning_rate was left out, is 0.01", "", list(WHOLE)),
            (
                "train.max_steps=5",
                "search of another recipe: train.max_steps was 4, is 5",
                "search",
                ["search", "recover"],
            ),
            ("finetune.max_steps=3", "fine-tuned model of another recipe: finetune.max_steps was 2", "", list(WHOLE)),
            ("finetune=null", "finetune.max_steps was 2, is left out", "", ["search", "recover"]),
            ("data.sequence_length=12", "data.sequence_length was 16, is 12", "", list(WHOLE)),
            ("lora={r: 2}", "lora.r was left out, is 2", "search", ["search", "recover"]),
        ],
    ),
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_another_search_does_not_take_its_place_until_the_folder_that_is_named_is_deleted(
    failed, recipe, steps, capsys, change, words, deleted, again
):
    failed()
    code, out = recipe(*OPTIONS, change)
    message = capsys.readouterr().err
    folder = out.with_name("out.unfinished") / deleted
    assert code == 2
    assert words in message
    assert f"delete {folder} to do it again" in message
    kept = out.with_name("kept")
    shutil.copytree(out.with_name("out.unfinished"), kept)
    shutil.rmtree(folder)
    assert recipe(*OPTIONS, change)[0] == 0
    assert set(steps) == set(again)
    shutil.rmtree(out)
    steps.clear()
    kept.rename(out.with_name("out.unfinished"))
    assert recipe(*OPTIONS)[0] == 0  # with the old value it goes on from the finished search
    assert not steps


def test_every_key_of_a_recipe_is_known_to_influence_a_stage_or_none():
    """Every key of a section is compared, or it is listed here among those that influence no stage."""
    values = {"model": {"path": "a"}, "data": {"path": "b"}, "dms": {"target": 0.5}, "output": {"path": "c"}}
    values = build_recipe(values).to_dict()
    known = influences(values, list(STAGES)[-1])
    left_out = {
        f"{section}.{key}"
        for section, keys in values.items()
        for key in (keys or {})
        if key not in (known.get(section) or {})
    }
    whole_sections = {key for key in left_out if key.partition(".")[0] in ("output", "hub", "compare", "eval")}
    assert left_out - whole_sections == {"dms.max_nonfinite_steps", "recover.train", "model.base", "model.license"}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '"a"', '{"model": 3, "dms": [], "train": null}'])
def test_a_folder_whose_recipe_is_not_there_is_left_alone(recipe, tmp_path, capsys, content):
    (tmp_path / "out.unfinished").mkdir()
    claim = tmp_path / "out.unfinished" / "recipe.json"
    claim.write_text(content)
    assert recipe(*OPTIONS)[0] == 2
    assert "is not a recipe that this version of hf_dms wrote" in capsys.readouterr().err
    assert claim.read_text() == content


def test_each_stage_has_a_precision_of_its_own(recipe, steps):
    """accelerate keeps the precision of a process's first Trainer for all later ones, unless it is reset."""
    precisions = ["finetune.bf16=true", "recover.bf16=false", "train.bf16=true", "recover.max_steps=3"]
    assert recipe(*OPTIONS, *precisions)[0] == 0
    assert steps == WHOLE


def test_two_runs_at_once_do_not_mix_their_work(recipe, tmp_path, steps, capsys):
    with only_writer(tmp_path / "out.unfinished"):
        assert recipe(*OPTIONS)[0] == 2
        assert "out.unfinished is being written by another process" in capsys.readouterr().err
        assert not steps
        assert not (tmp_path / "out").exists()
    assert recipe(*OPTIONS)[0] == 0
