"""After kill -9 of one of two processes the other one ends too, nothing is broken, and the same command continues."""

import shutil

import pytest
from helpers.launching import ROOT, launch
from helpers.runs import digest, result, write_recipe

KILLING = ROOT / "tests/helpers/killing.py"
NEVER = 0
FINETUNE, SEARCH, RECOVER = 6, 20, 10  # training steps of a process: two micro-batches each


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the result of an uninterrupted run of two processes in `whole`."""
    folder = tmp_path_factory.mktemp("dead_process")
    write_recipe(folder)
    code, _, err = run(folder, 0, NEVER)
    assert code == 0, err
    (folder / "out").rename(folder / "whole")
    return folder


def run(folder, rank, step):
    options = ["train.per_device_train_batch_size=2", "train.report_to=none"]
    return launch(KILLING, rank, step, "prune", folder / "recipe.yaml", *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "step"),
    [(1, 3), (1, FINETUNE + 1), (1, FINETUNE + 11), (0, FINETUNE + 14), (1, FINETUNE + SEARCH + 5)],
    ids=["fine-tuning", "first step", "search", "main process", "recover"],
)
def test_a_dead_process_ends_the_run_which_goes_on(whole, rank, step):
    for folder in whole.glob("out*"):
        shutil.rmtree(folder)
    dense = digest(whole / "dense")
    code, out, err = run(whole, rank, step)
    assert code != 0
    assert "SIGKILL" in err or "Signal 9" in err, err[-3000:]
    assert not (whole / "out").exists()
    assert digest(whole / "dense") == dense
    code, out, err = run(whole, rank, NEVER)
    assert code == 0, err
    finished = 1 + (step > FINETUNE) + (step > FINETUNE + SEARCH)  # the repair loads the finished fine-tuning again
    assert out.count("This is finished already") == finished, out
    assert result(whole / "out") == result(whole / "whole")
    assert digest(whole / "dense") == dense
    assert not (whole / "out.unfinished").exists()
