"""What tests start in processes of their own: the command line, disturbed at one of its events.

An event is a training step, or a change of a file or folder under the folder of the run.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable

from transformers import Trainer

from hf_dms.cli import main

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
LIMIT = 16 * 1024  # bytes that a file may have on a "full" disk: enough for the log, too few for weights


def _fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


errors: list[Exception] = []  # raised in the next training step

DISTURBANCES: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full disk": _fill_the_disk,  # a write fails from then on, by the operating system's own limit
    "error": lambda: errors.append(KeyError("a row that the data loader cannot read")),
}


def run(arguments: list[str], folder: str, at: int, log: str, disturbance: str = "kill") -> None:
    """Run `hf-dms`, disturbed at the event of a number; its exit code is the process's.

    Args:
        arguments: command and arguments.
        folder: whose changes count.
        at: 0 for never; then the number of events is the last line of the log.
        log: the file that gets what it prints.
        disturbance: one of `DISTURBANCES`.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count = _count_events(folder, at, DISTURBANCES[disturbance])
    code = main(arguments)
    print(f"{count()} events", flush=True)
    os._exit(code)


def _count_events(folder: str, at: int, disturb: Callable[[], object]) -> Callable[[], int]:
    count, train = 0, Trainer.training_step

    def hook(event, args):
        nonlocal count
        change = event in CHANGES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax"))
        if event == "step" or (change and str(args[0]).startswith(folder)):
            count += 1
            if count == at:
                disturb()

    def step(self, *args, **kwargs):
        sys.audit("step")
        if errors:
            raise errors[0]
        return train(self, *args, **kwargs)

    Trainer.training_step = step
    sys.addaudithook(hook)
    return lambda: count
