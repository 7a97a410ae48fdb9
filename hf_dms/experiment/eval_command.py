"""How good a saved model is: `hf-dms eval PATH`, by lm-evaluation-harness or on a file of one's own.

The harness is the real one, with its own options, task files and JSON; hf_dms adds that per-layer folders load without
trust_remote_code. Perplexity is that of the literature: the text as one stream of tokens, cut into windows of a
length that do not overlap, each scored by itself from its second token on, exp of the mean over all tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import transformers

from ..errors import HfDmsError
from ..tasks.data import DataConfig, load_examples
from ..tasks.evaluate import evenly_spaced, example_scores, summary, task_of


def run_lm_eval(path: str, arguments: list[str]) -> None:
    """Run lm-evaluation-harness on a saved model, as `lm_eval run --model hf` does.

    Args:
        path: folder or Hub id of a causal language model of any layout.
        arguments: the harness's own, `["--tasks", "lambada_openai", "--limit", "100"]`.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise HfDmsError("--tasks needs lm-evaluation-harness: pip install 'hf_dms[eval]'.") from None
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={path},dtype=auto", *arguments]
    with mock.patch.object(sys, "argv", command):
        cli_evaluate()


def measure_files(paths: list[str], data: DataConfig, examples: int | None, batch_size: int) -> list[dict[str, Any]]:
    """Perplexity or accuracy of saved models on the same data.

    Args:
        paths: folders or Hub ids; the first one is what the others are compared with.
        data: where the data is; all of it is measured on.
        examples: examples to measure on, at most; None for all.
        batch_size: examples per forward pass.

    Returns:
        Per model its `path`, `examples`, the metric, `stderr`, and but for the first `difference` and
        `difference_stderr` (see `evaluate.summary`).

    Raises:
        ValueError: a folder without a model, or with one for another purpose; data that does not fit.
    """
    rows: list[dict[str, Any]] = []
    first = None
    for path in paths:
        task, config = task_of(path)
        model = getattr(transformers, task.model_class).from_pretrained(path, dtype="auto").eval()
        processor = getattr(transformers, task.processor_class).from_pretrained(path)
        loaded = load_examples(data, task, processor, config.label2id)
        held_out = evenly_spaced(loaded.held_out, examples)
        scores = example_scores(model, task.metric, held_out, loaded.collate, batch_size)
        row = {"path": path, "examples": f"{len(scores)} {loaded.unit}"}
        rows.append(row | summary(task.metric, scores, first))
        first = scores if first is None else first
    return rows


def whole_file(path: str, **options: Any) -> DataConfig:
    """The data of a file that is all held out."""
    return DataConfig(path=path, held_out=path if Path(path).exists() else options.pop("split", "test"), **options)
