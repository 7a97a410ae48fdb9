"""optipfair itself beside our one-shot criteria: MLP widths of SmolLM2-135M, the same width in all layers.

    python -m venv rival && rival/bin/pip install --constraint constraints.txt -e . optipfair==0.4.2
    rival/bin/python benchmarks/rival_optipfair.py MODEL_FOLDER [--targets 0.8 0.5] [--batches 24]

MODEL_FOLDER: what `make model` makes. optipfair cuts every layer's MLP by the same percentage; ours get the width that
it came to as `sizes: {mlp: WIDTH}`, layout uniform. Criteria that use data see the same first batches of 2 × 256 tokens
(seed 0). Attention stays whole. Perplexity is on quality.py's windows and on refit.py's second text, right after the
cut. Each finished row is appended to rivals_optipfair.jsonl; rows that are there already are skipped.
"""

from importlib.metadata import version

import optipfair
from quality import append, rows_of
from rivals import options_and_texts
from transformers import AutoModelForCausalLM

from hf_dms import DMSConfig, attach_, choose_, prune
from hf_dms.tasks.generation import perplexity

OURS = ("magnitude", "wanda_sp", "taylor")
THEIRS = {  # name in its paper and in the table: (parameter, whether it sees data)
    "PPM": ("MAW", False),
    "PPM × activations": ("MAW", True),
    "PON": ("PON", False),
    "VOW": ("VOW", False),
}


def theirs(folder, criterion, target, batches):
    """The model that optipfair makes when it keeps this share of the MLP channels."""
    method, with_data = THEIRS[criterion]
    data = [{"input_ids": batch["input_ids"]} for batch in batches] if with_data else None
    return optipfair.prune_model(
        AutoModelForCausalLM.from_pretrained(folder), pruning_type="MLP_GLU", neuron_selection_method=method,
        pruning_percentage=100 * (1 - target), dataloader=data, show_progress=False,
    )  # fmt: skip


def ours(folder, criterion, width, batches):
    """The model that one of our criteria makes with this number of MLP channels in every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    attach_(model, DMSConfig(sizes={"mlp": width}, resource_scope="layers", pipeline="p-"))
    choose_(model, criterion, batches)
    return prune(model)


def main():
    options, texts, batches = options_and_texts("rivals_optipfair.jsonl")
    for target in options.targets:
        key = {"target": target, "batches": options.batches, "windows": options.windows}
        for tool, criterion in [("optipfair", name) for name in THEIRS] + [("hf_dms", name) for name in OURS]:
            same = [row for row in rows_of(options.results) if key.items() <= row.items()]
            width = same[0]["width"] if same else None
            if any((row["tool"], row["criterion"]) == (tool, criterion) for row in same):
                continue
            if tool == "optipfair":
                pruned = theirs(options.model, criterion, target, batches)
            else:
                pruned = ours(options.model, criterion, width, batches)
            row = key | {"tool": tool, "version": version(tool), "criterion": criterion}
            row |= {"width": pruned.config.intermediate_size}
            append(
                row | {name: round(perplexity(pruned.eval(), text), 2) for name, text in texts.items()}, options.results
            )


if __name__ == "__main__":
    main()
