"""Progress of a run: a bar in a terminal, lines elsewhere, scalars for TensorBoard and Trackio."""

import importlib
import sys

import pytest
from helpers.searches import arguments, dms, logged, trained
from helpers.tiny import Tokens, tiny_llama
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState

from hf_dms import DMSTrainer
from hf_dms.training import progress
from hf_dms.training.progress import Countdown, ProgressBar, ProgressLines, show_progress_


def callbacks_of(folder, **options):
    trainer = DMSTrainer(model=tiny_llama(), dms_config=dms(), args=arguments(folder, **options))
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback | PrinterCallback)]


@pytest.mark.parametrize(
    ("terminal", "disabled", "expected"),
    [(True, False, ProgressBar), (True, True, ProgressLines), (False, False, ProgressLines)],
)
def test_a_terminal_gets_a_bar_and_a_file_lines(terminal, disabled, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert [type(each) for each in callbacks_of(tmp_path, disable_tqdm=disabled)] == [expected]


@pytest.mark.parametrize(
    ("logs", "shown"),
    [
        ({"loss": 4.0, "task_loss": 3.0, "resource": 0.5, "target": 0.25}, "loss 3.000, resource 0.500, target 0.250"),
        ({"loss": 4.0}, "loss 4.000"),  # a training without a search
    ],
)
def test_the_progress_bar_shows_stage_task_loss_and_budget_of_a_search(logs, shown):
    bar = ProgressBar("search")
    state = TrainerState(max_steps=30, global_step=20, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs=logs | {"learning_rate": 0.1})
    assert bar.training_bar.postfix == shown
    assert bar.training_bar.desc == "search"
    assert bar.training_bar.initial == bar.training_bar.n == 20  # so the remaining time counts the remaining steps only
    bar.on_train_end(None, state, None)


def test_the_time_left_is_that_of_the_steps_to_come_at_the_pace_of_this_process(monkeypatch, capsys):
    clock = iter([100.0, 160.0])
    monkeypatch.setattr("hf_dms.training.progress.time.monotonic", lambda: next(clock))
    lines, state = ProgressLines("recover"), TrainerState(max_steps=130, global_step=10)
    lines.on_train_begin(None, state, None)
    state.global_step = 30
    lines.on_log(None, state, None, logs={"loss": 2.5, "learning_rate": 0.1})
    assert capsys.readouterr().out.splitlines() == [
        "recover: 130 steps, going on after step 10",
        "recover: step 30 of 130 (23 %), 0:05:00 left: loss 2.500",
    ]


@pytest.mark.parametrize("name", ["", "other_text_"])
def test_a_log_file_gets_each_evaluation(name, monkeypatch, capsys):
    monkeypatch.setattr("hf_dms.training.progress.time.monotonic", lambda: 0.0)
    lines, state = ProgressLines("search"), TrainerState(max_steps=20, global_step=10)
    logs = {f"eval_{name}loss": 2.5, f"eval_{name}runtime": 1.0, f"eval_{name}resource": 0.75, "epoch": 1.0}
    lines.on_log(None, state, None, logs=logs)
    line = f"search: step 10 of 20 (50 %), evaluated: eval_{name}loss 2.500, eval_{name}resource 0.750\n"
    assert capsys.readouterr().out == line
    lines.on_log(None, TrainerState(), None, logs={"eval_loss": 2.5})
    assert capsys.readouterr().out == "search: before any step, evaluated: eval_loss 2.500\n"


def test_tensorboard_gets_the_course_of_the_search(tmp_path):
    options = dict(report_to="tensorboard", max_steps=6, eval_strategy="steps", eval_steps=3)
    trainer = trained(tmp_path, **options)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent)).Reload()
    for name in ("task_loss", "resource_loss", "resource", "target", "kept/mlp", "soft_fraction/mlp", "gate_grad_norm"):
        scalars = read.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == list(range(1, 7))
        assert [scalar.value for scalar in scalars] == pytest.approx(logged(trainer, name))
    kept = {name for name in read.Tags()["scalars"] if name.startswith("train/kept/")}
    assert kept == {f"train/kept/{name}" for name in trainer.gates.dims}
    assert [scalar.step for scalar in read.Scalars("eval/resource")] == [3, 6]


def test_trackio_gets_the_course_of_the_search(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is imported
    trainer = trained(tmp_path, report_to="trackio", max_steps=6, eval_strategy="steps", eval_steps=3)
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    assert (tmp_path / "trackio").is_dir()
    (run,) = storage.get_runs(trainer.args.project)
    logs = storage.get_logs(trainer.args.project, run)
    for name in ("task_loss", "resource_loss", "resource", "target", "kept/mlp", "soft_fraction/mlp", "gate_grad_norm"):
        values = [log[f"train/{name}"] for log in logs if f"train/{name}" in log]
        assert values == pytest.approx(logged(trainer, name))
    assert len([log for log in logs if "eval/resource" in log]) == 2


def test_a_trainer_that_shows_nothing_is_left_so(tmp_path):
    trainer = Trainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=Tokens())
    trainer.remove_callback(PrinterCallback)
    show_progress_(trainer, "search")
    assert not [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressLines)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_work_that_is_no_training_says_how_much_time_is_left(clock, capsys):
    show = Countdown("repair", "layers")
    for layer in range(1, 31):
        clock[0] += 2.0
        show(layer, 30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "repair: 3 of 30 layers (10 %), 0:00:54 left"
    assert lines[-1] == "repair: 30 of 30 layers (100 %), 0:00:00 left"
    assert len(lines) == 10


def test_quick_work_prints_nothing(clock, capsys):
    show = Countdown("measuring", "batches")
    for batch in range(1, 5):
        clock[0] += 1.0
        show(batch, 4)
    assert capsys.readouterr().out == ""


def test_in_a_terminal_it_is_a_bar(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    show = Countdown("measuring", "batches")
    show(1, 4)
    show(4, 4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "measuring:   0%" in printed.err
    assert "/4 [" in printed.err
