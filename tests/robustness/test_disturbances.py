"""Whatever stops a run, the dense model is untouched, finished results are whole, and the same command continues.

`kill -9` in a recipe's run is in training/test_resume.py, in a push in test_killed_push.py, and the death of one of
several processes in test_dead_process.py.
"""

import random
import shutil
import signal

import pytest
from helpers.marks import slow
from helpers.runs import digest, num_events, result, run


def writable_(folder):
    """Make every folder in a folder writable again."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


@pytest.mark.parametrize("seed", slow(*range(8)))
@pytest.mark.parametrize(
    ("disturbance", "code"),
    [
        ("full disk", 2),
        ("terminate", -signal.SIGTERM),
        ("read-only", 2),
        pytest.param("error", 1, marks=pytest.mark.slow),
    ],
)
def test_a_disturbed_run_leaves_nothing_broken_and_goes_on(whole, disturbance, code, seed):
    shutil.rmtree(whole / "out", ignore_errors=True)
    (whole / "log").unlink(missing_ok=True)
    dense = digest(whole / "dense")
    at = random.Random(seed).randint(1, num_events(whole) * 3 // 4)
    try:
        assert run(whole, at, disturbance) == code, (whole / "log").read_text()
    finally:
        writable_(whole)
    log = (whole / "log").read_text()
    assert ("Traceback" in log) == (disturbance == "error"), log
    if code == 2:
        assert "hf-dms: error: " in log
        words = {"full disk": ("File too large", "is the disk full?"), "read-only": ("Permission denied",)}[disturbance]
        assert any(each in log for each in words), log  # torch does not always pass on the system's message
    assert digest(whole / "dense") == dense
    assert not (whole / "out").exists()
    assert run(whole) == 0, (whole / "log").read_text()
    assert result(whole / "out") == result(whole / "whole")
    assert digest(whole / "dense") == dense


@pytest.mark.parametrize("disturbance", ["kill", "full disk", "terminate", "read-only"])
@pytest.mark.parametrize("at", slow(3, *range(1, 3), *range(4, 9)))
def test_a_disturbed_cut_by_a_plan_leaves_nothing_broken(whole, disturbance, at):
    shutil.rmtree(whole / "out", ignore_errors=True)
    command = ["prune", "--plan", str(whole / "whole"), f"model.path={whole / 'dense'}", f"output.path={whole / 'out'}"]
    dense = digest(whole / "dense")
    codes = {"kill": -signal.SIGKILL, "full disk": 2, "terminate": -signal.SIGTERM, "read-only": 2}
    try:
        assert run(whole, at, disturbance, command) == codes[disturbance], (whole / "log").read_text()
    finally:
        writable_(whole)
    assert not (whole / "out").exists()
    assert run(whole, command=command) == 0
    assert (whole / "out" / "dms_plan.json").read_bytes() == (whole / "whole" / "dms_plan.json").read_bytes()
    assert digest(whole / "dense") == dense
