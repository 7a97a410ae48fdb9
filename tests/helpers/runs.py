"""A recipe with every step, run in a process of its own, and the parts of its result that can be compared."""

import hashlib
import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import killing
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["helpers.killing", "hf_dms.experiment.run"])  # imported once for all processes


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


def run(folder: Path, at: int = 0, disturbance: str = "kill", command: list[str] | None = None) -> int:
    """Run a command, by default the recipe of a folder, in a process; returns its exit code, -9 if it was killed."""
    command = ["prune", str(folder / "recipe.yaml")] if command is None else command
    watched = folder / (".out" if "--plan" in command else "out")
    arguments = (command, str(watched), at, str(folder / "log"), disturbance)
    process = processes.Process(target=killing.run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def result(out: Path) -> dict[str, bytes | dict]:
    """All files of a result but TensorBoard's; the report without what depends on the clock."""
    files = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    files = {name: content for name, content in files.items() if not name.startswith("runs/")}
    report = json.loads(files.pop("dms_report.json"))
    del files["README.md"], files["report.html"]  # they contain measured speeds
    del report["seconds"]
    for column in ("dense", "pruned"):
        del report[column]["tokens_per_second"]
    return files | {"report": report}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an uninterrupted run: its result in `whole`, its printed output in `log`."""
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder)
    assert run(folder) == 0, (folder / "log").read_text()
    (folder / "out").rename(folder / "whole")
    (folder / "log").rename(folder / "whole.log")
    return folder


def num_events(folder: Path) -> int:
    """Events of the uninterrupted run."""
    return int(re.findall(r"(\d+) events", (folder / "whole.log").read_text())[-1])


def digest(folder):
    """The contents of a folder, by file name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
