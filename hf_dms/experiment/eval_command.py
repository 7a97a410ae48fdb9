"""`hf-dms eval PATH`: the quality of a saved model, by lm-evaluation-harness or on your own file.

lm-evaluation-harness runs unchanged, with its own options, task files and JSON; hf_dms makes per-layer folders load in
it without trust_remote_code. Perplexity is defined as in the literature: the text is one stream of tokens, cut into
windows of equal length that do not overlap. Each window is scored separately from its second token on. Perplexity is
exp of the mean over all tokens. If the tokenizer puts a token before a text, every window begins with that token
(tasks/generation.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from ..archs.inputs import max_tokens
from ..errors import HfDmsError
from ..files import load_saved
from ..tasks.data import DataConfig
from ..tasks.evaluate import evenly_spaced, example_scores, summary
from ..tasks.generation import load_streams, windows_of
from ..tasks.registry import load_examples, task_of
from ..tasks.task import Examples, Task
from ..tasks.texts import check_length

LENGTHS = (128, 2048)  # default numbers of tokens per window
TEXT_LENGTH = 512  # texts to classify are truncated to this many tokens, or to the model's number of positions


def run_lm_eval(path: str, arguments: list[str]) -> None:
    """Run lm-evaluation-harness on a saved model, as `lm_eval run --model hf` does.

    Args:
        path: folder or Hub id of a causal language model of any layout.
        arguments: arguments of lm-eval, such as `["--tasks", "lambada_openai", "--limit", "100"]`.

    Raises:
        HfDmsError: lm-eval is not installed, or it has no such task.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise HfDmsError("--tasks needs lm-evaluation-harness: pip install 'hf_dms[eval]'.") from None
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={path},dtype=auto", *arguments]
    # The harness has no function that takes arguments; it reads those of the process.
    with mock.patch.object(sys, "argv", command):
        try:
            cli_evaluate()
        except ValueError as error:
            if "Tasks not found" not in str(error):
                raise
            raise HfDmsError(f"--tasks: lm-evaluation-harness says: {error}. `lm_eval ls tasks` lists them.") from error


def measure_files(
    paths: list[str], data: DataConfig, lengths: Sequence[int] | None, examples: int | None, batch_size: int
) -> list[dict[str, Any]]:
    """Perplexity or accuracy of saved models on the same data.

    Args:
        paths: folders or Hub ids. The others are compared with the first one.
        data: the data; all of it is used.
        lengths: tokens per window of perplexity. None: those of `LENGTHS` that are not longer than the text, or else
            the whole text as one window.
        examples: largest number of examples; None for all.
        batch_size: examples per forward pass.

    Returns:
        Rows, by length and model, with `path`, `examples`, the metric and `stderr`; except for the first model also
        `difference` and `difference_stderr` (see `evaluate.summary`).

    Raises:
        HfDmsError: a number is too small, a folder has no model, the models have different tasks, the data does not
            fit them, or their tokenizers split the text differently.
    """
    # A window of one token predicts nothing, and text never fills windows of none.
    least = {"--lengths": (lengths or [], 2), "--examples": ([examples], 1), "--batch-size": ([batch_size], 1)}
    for name, (values, limit) in least.items():
        for value in values:
            if value is not None and value < limit:
                raise HfDmsError(f"{name} must be at least {limit}, got {value}.")
    found = [task_of(path) for path in paths]
    task = found[0][0]
    for path, (other, _) in zip(paths, found):
        if other is not task:
            raise HfDmsError(
                f"{paths[0]} is a model for {task.name}, {path} one for {other.name}. They cannot be compared on the "
                "same data; give models of one task."
            )
    processors = [load_saved(getattr(transformers, task.processor_class), path) for path in paths]
    configs = [config for _, config in found]
    load = _windows_of_all if task.generates else _examples_of_all
    by_length = load(task, paths, processors, configs, data, lengths)
    models = [_load(task, *each) for each in zip(paths, configs, by_length[0])]
    rows = []
    for per_model in by_length:
        first = None
        for path, model, loaded in zip(paths, models, per_model):
            held_out = evenly_spaced(loaded.held_out, examples)
            scores = example_scores(model, task, held_out, loaded.collate, batch_size)
            row = {"path": path, "examples": f"{len(scores)} {loaded.unit}"}
            # Differences are paired: every model is scored on the same examples as the first.
            rows.append(row | summary(task, scores, first))
            first = scores if first is None else first
    return rows


def _load(task: Task, path: str, config: Any, examples: Examples) -> Any:
    config.update(examples.config)
    return load_saved(getattr(transformers, task.model_class), path, config=config, dtype="auto").eval()


def whole_data(path: str, **options: Any) -> DataConfig:
    """A data config that measures on a whole file or folder, or on the test split of a dataset on the Hub."""
    if Path(path).exists():
        return DataConfig(path=path, held_out=path, **options)
    return DataConfig(path=path, split="test", held_out="test", **options)


# ---- examples --------------------------------------------------------------------------------------------------------
def _examples_of_all(
    task: Task, paths: list[str], processors: list[Any], configs: list[Any], data: DataConfig, lengths: Any
) -> list[list[Examples]]:
    """The examples for each classifier. `lengths` is only for language models, and is ignored."""
    longest = [min(TEXT_LENGTH, max_tokens(config) or TEXT_LENGTH) for config in configs]
    data_of = [replace(data, sequence_length=length) for length in longest]
    return [[load_examples(*each[:1], task, *each[1:]) for each in zip(data_of, processors, configs)]]


def _windows_of_all(
    task: Task,
    paths: list[str],
    processors: list[Any],
    configs: list[Any],
    data: DataConfig,
    lengths: Sequence[int] | None,
) -> list[list[Examples]]:
    """For each length the windows for each language model. Each model's text is tokenised once."""
    # Compared as tokens, not as tokenizers: two tokenizers may differ in files and agree on this text.
    streams = [load_streams(data, *each) for each in zip(processors, configs)]
    for path, other in zip(paths, streams):
        if not torch.equal(other.held_out, streams[0].held_out):
            raise HfDmsError(
                f"The tokenizers of {paths[0]} and {path} make different tokens of {data.path}, so that windows hold "
                "different texts and perplexities per token cannot be compared. Measure each model separately, or in "
                "bits per byte with --tasks."
            )
    chosen = lengths or _fitting(len(streams[0].held_out))
    for length in chosen:
        for config in configs:
            check_length(length, "A window has", config)
    return [[windows_of(stream, length) for stream in streams] for length in chosen]


def _fitting(tokens: int) -> list[int]:
    """The lengths of `LENGTHS` that are not longer than a text, or else the length of the text."""
    fitting = [length for length in LENGTHS if length <= tokens]
    for length in LENGTHS:
        if length > tokens:
            print(f"Windows of {length} tokens are left out: the text has {tokens}.", file=sys.stderr)
    # A window of one token has none to predict.
    return fitting or [max(tokens, 2)]
