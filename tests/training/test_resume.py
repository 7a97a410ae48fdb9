"""kill -9 at any moment, the same command again: the same result, byte for byte."""

import json
import multiprocessing
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers import killing
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM

KILLS = 5  # of one run, each at a random event; then it may end

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["helpers.killing", "hf_dms.experiment.run"])  # imports once, not once per process


def write_recipe(folder: Path) -> Path:
    """Every step that a recipe has, with dropout; logs, checkpoints and epochs (4 steps) fall on different steps."""
    save_tokenizer(folder / "dense")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, attention_dropout=0.1)).save_pretrained(folder / "dense")
    rows = [{"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60))} for i in range(1, 12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(folder / "dense"), "dtype": "float32"},
        "data": {"path": "text.jsonl", "sequence_length": 16, "held_out": 0.2},
        "finetune": {"max_steps": 3},
        "dms": {"target": 0.7, "warmup_steps": 2, "layout": "per_layer"},
        "train": {
            "max_steps": 10, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True,
            "save_steps": 3, "logging_steps": 4, "report_to": "tensorboard",
        },
        "recover": {"repair": {"examples": 4}, "max_steps": 5, "distillation": {"weight": 0.5}},
        "output": {"path": str(folder / "out")},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def run(folder: Path, kill_at: int = 0) -> int:
    """Run the recipe of a folder in a process; returns its exit code, -9 if it was killed."""
    arguments = ([str(folder / "recipe.yaml")], str(folder / "out"), kill_at, str(folder / "log"))
    process = processes.Process(target=killing.prune, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def result(out: Path) -> dict[str, bytes | dict]:
    """All files of a result but TensorBoard's; the report without what depends on the clock."""
    files = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    files = {name: content for name, content in files.items() if not name.startswith("runs/")}
    report = json.loads(files.pop("dms_report.json"))
    del files["README.md"], files["report.html"]  # they tell the speed
    del report["seconds"]
    for column in ("dense", "pruned"):
        del report[column]["tokens_per_second"]
    return files | {"report": report}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an uninterrupted run; `whole` has its result, `log` what it printed."""
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder)
    assert run(folder) == 0, (folder / "log").read_text()
    (folder / "out").rename(folder / "whole")
    (folder / "log").rename(folder / "whole.log")
    return folder


def test_a_log_file_gets_lines_that_tell_stage_step_and_time_left(whole):
    log = (whole / "whole.log").read_text()
    assert "\r" not in log
    assert re.search(
        r"^search: step 4 of 10 \(40 %\), \d:\d\d:\d\d left: loss [\d.]+, resource [\d.]+, target [\d.]+$", log, re.M
    )
    assert "fine-tuning: step 3 of 3 (100 %), checkpoint saved" in log
    stages = ["Fine-tuning", "Measuring the dense", "Searching", "Measuring the pruned", "Repairing", "Retraining"]
    stages += ["retraining: step 4 of 5", "Measuring the recovered", "Saving to"]
    places = [log.index(stage) for stage in stages]
    assert places == sorted(places)


def test_the_scalars_of_every_stage_are_kept_with_the_result(whole):
    stages = {file.relative_to(whole / "whole" / "runs").parts[0] for file in (whole / "whole").rglob("events.*")}
    assert stages == {"finetune", "search", "recover"}


def num_events(folder: Path) -> int:
    return int(re.findall(r"(\d+) events", (folder / "whole.log").read_text())[-1])


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_killed_runs_end_as_the_uninterrupted_one(whole, seed):
    generator, events = random.Random(seed), num_events(whole)
    shutil.rmtree(whole / "out", ignore_errors=True)
    codes = [run(whole, kill_at=generator.randint(1, events // 2)) for _ in range(KILLS)]
    assert set(codes) <= {-signal.SIGKILL, 0}, (whole / "log").read_text()
    assert codes[:2] == [-signal.SIGKILL] * 2
    assert run(whole) == 0, (whole / "log").read_text()
    assert result(whole / "out") == result(whole / "whole")
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        ["dense", "text.jsonl", "recipe.yaml", "whole", "whole.log", "out", "log"]
    )
