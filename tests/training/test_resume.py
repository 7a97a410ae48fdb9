"""After kill -9 at any moment, the same command gives the same result, byte for byte."""

import random
import re
import shutil
import signal

import pytest
from helpers.marks import slow
from helpers.runs import num_events, result, run

KILLS = 5  # of one run, each at a random event; then it may end


def test_a_log_file_gets_lines_that_tell_stage_step_and_time_left(whole):
    log = (whole / "whole.log").read_text()
    assert "\r" not in log
    assert re.search(
        r"^search: step 4 of 10 \(40 %\), \d:\d\d:\d\d left: loss [\d.]+, resource [\d.]+, target [\d.]+$", log, re.M
    )
    assert "fine-tuning: step 3 of 3 (100 %), checkpoint saved" in log
    stages = ["Fine-tuning", "Measuring the dense", "Searching", "Measuring the pruned", "Repairing", "Recovering"]
    stages += ["recover: step 4 of 5", "Measuring the recovered", "Saving to"]
    places = [log.index(stage) for stage in stages]
    assert places == sorted(places)


def test_the_scalars_of_every_stage_are_kept_with_the_result(whole):
    stages = {file.relative_to(whole / "whole" / "runs").parts[0] for file in (whole / "whole").rglob("events.*")}
    assert stages == {"finetune", "search", "recover"}


@pytest.mark.parametrize("seed", slow(*range(20)))
def test_killed_runs_end_as_the_uninterrupted_one(whole, seed):
    generator, events = random.Random(seed), num_events(whole)
    shutil.rmtree(whole / "out", ignore_errors=True)
    codes = [run(whole, at=generator.randint(1, events // 2)) for _ in range(KILLS)]
    assert set(codes) <= {-signal.SIGKILL, 0}, (whole / "log").read_text()
    assert codes[:2] == [-signal.SIGKILL] * 2
    assert run(whole) == 0, (whole / "log").read_text()
    assert result(whole / "out") == result(whole / "whole")
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        ["dense", "text.jsonl", "recipe.yaml", "whole", "whole.log", "out", "log"]
    )
