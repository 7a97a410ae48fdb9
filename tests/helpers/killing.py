"""The command line in a process of its own, disturbed at one of its events.

An event is a training step, or a change of a file or folder under the folder of the run.
"""

import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import dataloader
from transformers import Trainer

from hf_dms.cli import main
from hf_dms.report.page import TEMPLATES

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
LIMIT = 16 * 1024  # bytes that a file may have on a "full" disk: enough for the log, too few for weights


def _fill_the_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _make_read_only(folder: Path) -> None:
    """Make a run's folders, their contents and their parent read-only."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0  # root could write nevertheless
    for path in [*folder.parent.glob(f"*{folder.name.lstrip('.')}*"), folder.parent]:
        for each in [*path.rglob("*"), path] if path != folder.parent else [path]:
            if each.is_dir():
                each.chmod(0o555)


def without_picture(panel) -> str:
    """In place of a figure of a page. Drawing them takes a third of a short run, and tests/report does it."""
    return f"<svg>{panel.title}</svg>"


errors: list[Exception] = []  # the next batch of a data loader raises the error in this list

DISTURBANCES: dict[str, Callable[[Path], object]] = {
    "kill": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda folder: os.kill(os.getpid(), signal.SIGTERM),
    "full disk": _fill_the_disk,  # from then on the system's limit on file sizes makes writes fail
    "read-only": _make_read_only,
    "error": lambda folder: errors.append(KeyError("a row that the data loader cannot read")),
}


def run(arguments: list[str], folder: str, at: int, log: str, disturbance: str = "kill") -> None:
    """Run `hf-dms`, disturbed at the event with a given number. The process ends with the exit code of `hf-dms`.

    Args:
        arguments: command and arguments.
        folder: the folder whose changes are events.
        at: number of the event. 0: no disturbance, and the last line of the log is the number of events.
        log: file for the printed output.
        disturbance: one of `DISTURBANCES`.
    """
    gc.freeze()  # as in fixtures.py
    TEMPLATES.globals["svg"] = without_picture
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count = _count_events(folder, at, DISTURBANCES[disturbance])
    code = main(arguments)
    print(f"{count()} events", flush=True)
    os._exit(code)


def _count_events(folder: str, at: int, disturb: Callable[[Path], object]) -> Callable[[], int]:
    count, train, fetch = 0, Trainer.training_step, dataloader._BaseDataLoaderIter.__next__

    def hook(event, args):
        nonlocal count
        change = event in CHANGES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax"))
        if event == "step" or (change and str(args[0]).startswith(folder)):
            count += 1
            if count == at:
                disturb(Path(folder))

    def step(self, *args, **kwargs):
        sys.audit("step")
        return train(self, *args, **kwargs)

    def next_batch(self):
        if errors:
            raise errors[0]
        return fetch(self)

    Trainer.training_step = step
    dataloader._BaseDataLoaderIter.__next__ = next_batch
    sys.addaudithook(hook)
    return lambda: count


def kill_at_step(at: int) -> None:
    """Let this process be killed at the training step with a given number."""
    steps, train = 0, Trainer.training_step

    def step(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, *args, **kwargs)

    Trainer.training_step = step


if __name__ == "__main__":  # accelerate launch ... killing.py RANK STEP ARGUMENTS: `hf-dms`, one process of it killed
    rank, step, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        kill_at_step(int(step))
    sys.exit(main(arguments))
