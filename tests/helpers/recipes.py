"""Recipes on a tiny dense folder, and the command line run on them."""

import contextlib
import json

import pytest
import torch
import yaml
from helpers.tiny import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_dms.cli import main

WORDS = [f"w{i}" for i in range(TINY["vocab_size"] - 3)]


def save_tokenizer(folder) -> None:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


@contextlib.contextmanager
def killed_in(monkeypatch, owner, name, after=False):
    """Context: the first call of a function ends the program, before or after the function has done its work."""
    function = getattr(owner, name)

    def die(*args, **kwargs):
        if after:
            function(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def recipe(dense, tmp_path):
    """A function that writes a recipe and runs the command line on it; returns (exit code, output folder)."""
    rows = [{"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60))} for i in range(1, 12)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(dense), "dtype": "float32"},
        "data": {"path": "text.jsonl", "sequence_length": 16, "held_out": 0.2},
        "dms": {"target": 0.6, "warmup_steps": 2},
        "train": {"max_steps": 8, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
        "eval": {"prompt": "w1 w2", "new_tokens": 3},
        "output": {"path": str(tmp_path / "out")},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))

    def run(*overrides, command="prune"):
        return main([command, str(file), *overrides]), tmp_path / "out"

    return run
