"""`data.path: self`, or `self` in `data.mix`: texts that the dense model writes. They are cached.

The cache is `hf_dms/own-texts` in the folder of the Hub's cache (`HF_HOME`). A file's name depends on the weights, and
on the number and length of the texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from ..tasks.own_texts import own_texts
from ..tasks.registry import load_examples
from ..training.distributed import print_on_main, run_on_main
from ..training.progress import Countdown
from .prepare import Prepared
from .stages import load_model

SEED = 0


def with_own_texts(prepared: Prepared) -> Prepared:
    """A prepared recipe with the dense model's own texts among its examples, if its data asks for them.

    Raises:
        HfDmsError: the tokenizer has no token to begin a text with.
    """
    recipe = prepared.recipe
    if not recipe.data.uses_own_texts:
        return prepared
    path = own_texts_file(prepared)
    run_on_main(lambda: None if path.exists() else _write(prepared, path))
    data = recipe.data.with_own_texts(str(path))
    examples = load_examples(data, recipe.task, prepared.processor, prepared.config)
    # The training after the cut has the same data, unless the recipe gives it its own.
    recover_examples = examples if prepared.recover_examples is prepared.examples else prepared.recover_examples
    return dataclasses.replace(prepared, examples=examples, recover_examples=recover_examples)


def own_texts_file(prepared: Prepared) -> Path:
    """The file for the texts of a recipe's model; it may not exist yet."""
    data = prepared.recipe.data
    about = [_weights(prepared), data.own_sequences, data.sequence_length, SEED]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return Path(HF_HOME) / "hf_dms" / "own-texts" / f"{digest}.jsonl"


def _weights(prepared: Prepared) -> list[Any]:
    """Values that change when the weights at model.path change: sizes and times of files, or the commit on the Hub."""
    model = prepared.recipe.model
    folder = Path(model.path)
    if not folder.is_dir():
        # A branch of the Hub moves; its commit does not.
        return [model.path, prepared.config._commit_hash or model.revision]
    # Size and time, not a hash of the content, which would read gigabytes at every start.
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))]
    return [str(folder.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]]


def _write(prepared: Prepared, path: Path) -> None:
    recipe = prepared.recipe
    count, length = recipe.data.own_sequences, recipe.data.sequence_length
    print_on_main(f"The dense model writes {count} texts of {length} tokens to calibrate on ...")
    model: Any = load_model(prepared).to(prepared.arguments["search"].device)
    texts, sampled = own_texts(model, prepared.processor, count, length, SEED, Countdown("own texts", "texts"))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    # In one step: a killed run, or a second one that writes the same texts, never leaves a half-written file.
    unfinished.replace(path)
    print_on_main(f"They are {sampled} tokens, kept in {path}.")
