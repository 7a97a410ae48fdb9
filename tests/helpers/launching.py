"""Commands in two processes, by `accelerate launch`."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 240  # much longer than any launch, so a deadlock fails the test


def launch(*command):
    """Run a command in two processes; (exit code, standard output, standard error)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = str(ROOT / "recipes/accelerate/ddp.yaml")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", port]
    process = subprocess.Popen(
        [*start, *map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err
