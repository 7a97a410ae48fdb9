"""What a user does with the Hub, in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.

`python hub_session.py FOLDER` pushes the models in FOLDER, and writes the result of each step to FOLDER/results.json.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import transformers
from helpers.hub_standin import READ_TOKEN, WRITE_TOKEN
from helpers.recipes import WORDS
from helpers.tiny import Tokens, tiny_llama
from transformers import TrainingArguments

from hf_dms import DMSConfig, DMSTrainer
from hf_dms.checkpoint.hub import push
from hf_dms.cli import main

transformers.utils.logging.disable_progress_bar()  # the printed text is compared
FOLDER = Path(sys.argv[1])
RESULTS: dict[str, dict] = {}


def step(name: str, *arguments: object, token: str | None = WRITE_TOKEN) -> None:
    """Run the command line and keep its result."""
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    RESULTS[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def push_models() -> None:
    step("stock", "push", FOLDER / "stock", "tester/stock")
    step("again", "push", FOLDER / "stock", "tester/stock")
    step("per_layer", "push", FOLDER / "per_layer", "tester/per-layer", "--private", "--message", "Layers differ")
    step("branch", "push", FOLDER / "per_layer", "tester/stock", "--revision", "layers/differ")


def push_in_vain() -> None:
    step("refused token", "push", FOLDER / "stock", "tester/vain", token="hf_test_long_expired")
    step("read token", "push", FOLDER / "stock", "tester/vain", token=READ_TOKEN)
    step("no token", "push", FOLDER / "stock", "tester/vain", token=None)
    step("other namespace", "push", FOLDER / "stock", "somebody/vain")
    step("no namespace", "push", FOLDER / "stock", "nobody/vain")
    step("no branch", "push", FOLDER / "stock", "tester/stock", "--revision", "refs/heads")
    with mock.patch("time.sleep"):  # huggingface_hub waits between its attempts
        step("dropped", "push", FOLDER / "sharded", "tester/dropped", "--private")
    step("after the drop", "push", FOLDER / "sharded", "tester/dropped", "--private")
    step("other layout", "push", FOLDER / "stock", "dropped")
    try:
        push(FOLDER / "stock", "tester/vain", token="hf_test_with\na_line_break")
    except ValueError as error:
        RESULTS["broken token"] = {"code": 2, "out": "", "err": str(error)}


def push_by_trainer() -> None:
    where = {"push_to_hub": True, "hub_model_id": "tester/trained", "hub_private_repo": True}
    arguments = TrainingArguments(
        str(FOLDER / "out"), max_steps=4, save_steps=2, use_cpu=True, disable_tqdm=True, report_to="none", **where
    )
    config = DMSConfig(target=0.6, warmup_steps=1)
    trainer = DMSTrainer(model=tiny_llama(), args=arguments, dms_config=config, train_dataset=Tokens())
    trainer.train()
    card = {"finetuned_from": "tester/stock", "tasks": "text-generation", "tags": "mine", "license": "mit"}
    job = trainer.push_to_hub(blocking=False, revision="with-card", model_name="Named", **card)
    RESULTS["trainer later"] = {"code": 0, "out": job.result(), "err": ""}
    RESULTS["trainer"] = {"code": 0, "out": trainer.push_to_hub("From the trainer"), "err": ""}


def prune_by_recipe() -> None:
    text = "\n".join(" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60)) for i in range(1, 12))
    (FOLDER / "text.txt").write_text(text)
    recipe = {
        "model": {"path": "tester/stock", "dtype": "float32"},
        "data": {"path": str(FOLDER / "text.txt"), "sequence_length": 16, "held_out": 0.2},
        "dms": {"target": 0.8, "warmup_steps": 2, "pipeline": "p-"},
        "train": {"max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
    }
    (FOLDER / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    for name, repo_id in (("recipe", "tester/smaller"), ("recipe in vain", "somebody/smaller")):
        output = f"output.path={FOLDER / name}"
        step(name, "prune", FOLDER / "recipe.yaml", output, f"hub.repo_id={repo_id}", "hub.private=true")
    step("recipe without token", "validate", FOLDER / "recipe.yaml", "output.path=x", "hub.repo_id=a/b", token=None)


if __name__ == "__main__":
    for part in (push_models, push_in_vain, push_by_trainer, prune_by_recipe):
        part()
    (FOLDER / "results.json").write_text(json.dumps(RESULTS))
