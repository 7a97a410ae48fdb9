"""optipfair itself beside our one-shot criteria: MLP widths of SmolLM2-135M, the same width in all layers.

    python -m venv rival && rival/bin/pip install --constraint constraints.txt -e . optipfair==0.4.2
    rival/bin/python benchmarks/rival_optipfair.py MODEL_FOLDER [--targets 0.8 0.5] [--batches 24]

MODEL_FOLDER: what `make model` makes. optipfair cuts every layer's MLP by the same percentage; ours get the width that
it came to as `sizes: {mlp: WIDTH}`, layout uniform. What looks at data sees the same first batches of 2 × 256 tokens
(seed 0); attention stays whole. Perplexity is on quality.py's windows and on refit.py's second text, right after the
cut. Each finished row is appended to rivals_optipfair.jsonl; rows that are there already are skipped.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import optipfair
from quality import HERE, append, load_text, rows_of, shuffled
from refit import labelled, second_text
from transformers import AutoModelForCausalLM

from hf_dms import DMSConfig, attach_, choose_, prune
from hf_dms.tasks.generation import perplexity

OURS = ("magnitude", "wanda_sp", "taylor")
THEIRS = {  # name in the table: (method, whether it sees data)
    "PPM": ("PPM", False),
    "PPM × activations": ("PPM", True),
    "PON": ("PON", False),
    "VOW": ("VOW", False),
}


def theirs(folder, criterion, target, batches):
    """The model that optipfair makes with this share of the MLP channels."""
    method, with_data = THEIRS[criterion]
    data = [{"input_ids": batch["input_ids"]} for batch in batches] if with_data else None
    return optipfair.prune_model(
        AutoModelForCausalLM.from_pretrained(folder), pruning_type="MLP_GLU", neuron_selection_method=method,
        pruning_percentage=100 * (1 - target), dataloader=data, show_progress=False,
    )  # fmt: skip


def ours(folder, criterion, width, batches):
    """The model that a criterion of ours makes with so many MLP channels in every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    attach_(model, DMSConfig(sizes={"mlp": width}, resource_scope="layers", pipeline="p-"))
    choose_(model, criterion, batches)
    return prune(model)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--results", default=HERE / "rivals_optipfair.jsonl")
    options = parser.parse_args()
    results = Path(options.results)
    sequences, held_out = load_text(options.model, options.windows)
    texts = {"perplexity": held_out, "second_text": second_text(options.model, options.windows)}
    batches = labelled(shuffled(sequences, 0)[: 2 * options.batches], 2)
    for target in options.targets:
        key = {"target": target, "batches": options.batches, "windows": options.windows}
        for tool, criterion in [("optipfair", name) for name in THEIRS] + [("hf_dms", name) for name in OURS]:
            same = [row for row in rows_of(results) if key.items() <= row.items()]
            width = same[0]["width"] if same else None
            if any((row["tool"], row["criterion"]) == (tool, criterion) for row in same):
                continue
            if tool == "optipfair":
                pruned = theirs(options.model, criterion, target, batches)
            else:
                pruned = ours(options.model, criterion, width, batches)
            row = key | {"tool": tool, "version": version(tool), "criterion": criterion}
            row |= {"width": pruned.config.intermediate_size}
            append(row | {name: round(perplexity(pruned.eval(), text), 2) for name, text in texts.items()}, results)


if __name__ == "__main__":
    main()
