"""What `test_resume.py` starts in processes of their own: the command line, killed at one of its events.

An event is a training step, or a change of a file or folder under the folder of the run.
"""

import os
import signal
import sys
from collections.abc import Callable

from transformers import Trainer

from hf_dms.cli import main

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def prune(arguments: list[str], folder: str, kill_at: int, log: str) -> None:
    """Run `hf-dms prune`, until `kill -9` at the event of that number; its exit code is the process's.

    Args:
        arguments: of the command.
        folder: whose changes count.
        kill_at: 0 for never; then the number of events is the last line of the log.
        log: the file that gets what it prints.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count = _count_events(folder, kill_at)
    code = main(["prune", *arguments])
    print(f"{count()} events", flush=True)
    os._exit(code)


def _count_events(folder: str, kill_at: int) -> Callable[[], int]:
    count, train = 0, Trainer.training_step

    def hook(event, args):
        nonlocal count
        change = event in CHANGES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax"))
        if event == "step" or (change and str(args[0]).startswith(folder)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def step(self, *args, **kwargs):
        sys.audit("step")
        return train(self, *args, **kwargs)

    Trainer.training_step = step
    sys.addaudithook(hook)
    return lambda: count
