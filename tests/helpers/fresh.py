"""Python processes that begin with torch imported: half of the time of one that loads a tiny model is spent on that.

They are forked from a server, one for each process of pytest. It has imported nothing of Hugging Face or hf_dms, so
that what a process imports of them reads the environment of that process.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

# transformers imports all of these with its first model
PRELOADED = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.export")
PRELOADED += ("torch.distributed.checkpoint.hf_storage",)
NOT_PRELOADED = {"hf_dms", "transformers", "huggingface_hub", "datasets", "accelerate", "peft", "tokenizers"}
SECONDS = 300  # much longer than any of them takes, so a deadlock fails the test


def run(arguments, cwd=None, env=None) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`, but \\r stays \\r."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        start(arguments, cwd, env, out, err)
        code = wait()
        return subprocess.CompletedProcess(arguments, code, *(file.read_bytes().decode() for file in (out, err)))


def start(arguments, cwd=None, env=None, out=os.devnull, err=os.devnull) -> int:
    """Start `python ARGUMENTS` (-c code, -m module or a script); returns its process id. Only one at a time."""
    request = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
    print(json.dumps(request | {"out": str(out), "err": str(err)}), file=_server().stdin, flush=True)
    return int(_server().stdout.readline())


def wait() -> int:
    """The exit code of the process that was started; negative: minus the signal that ended it."""
    return int(_server().stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    # It ends when this process does, with the pipe to its input.
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve() -> dict:
    """Fork a process for each request. Returns the request, in that process."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert not NOT_PRELOADED & sys.modules.keys()
    gc.freeze()
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def become(request: dict) -> None:
    """Turn this process into the requested one, and run it."""
    signal.alarm(SECONDS)
    for descriptor, path in enumerate((os.devnull, request["out"], request["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    kind, *rest = request["arguments"]
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(main))
    elif kind == "-m":
        sys.path[0], sys.argv = request["cwd"], ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    become(serve())
