"""What the scripts that run another pruner beside ours share: their options, and the text that both see."""

import argparse
from pathlib import Path

from quality import HERE, load_text, shuffled
from refit import labelled, second_text


def options_and_texts(results):
    """The options of a script that runs a rival, and its data.

    Args:
        results: name of the file of its rows.

    Returns:
        The options; per column of the table the windows to measure on; the batches of 2 × 256 tokens to choose on.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--results", type=Path, default=HERE / results)
    options = parser.parse_args()
    sequences, held_out = load_text(options.model, options.windows)
    texts = {"perplexity": held_out, "second_text": second_text(options.model, options.windows)}
    return options, texts, labelled(shuffled(sequences, 0)[: 2 * options.batches], 2)
