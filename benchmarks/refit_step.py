"""Seconds of a search step over masks and over refitted weights, and of a refresh, on SmolLM2-135M.

    python benchmarks/refit_step.py MODEL_FOLDER [--share 0.7]

One forward and backward pass of 2 × 256 tokens, weights frozen, KV groups and MLP widths per layer, every ratio at
1 − share; the median of --repeats. A refresh of DMSTrainer has 24 sequences. CPU seconds of one thread, so
that a busy machine counts less.
"""

import argparse
import statistics
import time

import torch
from quality import load_text, request, shuffled
from tables import add_row
from transformers import AutoModelForCausalLM

from hf_dms import attach_, detach_
from hf_dms.gating.attach import gates_of
from hf_dms.refit.search import RefittedSearch


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=24, help="to refit on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sequences = shuffled(load_text(options.model, 1)[0], 0)
    model = AutoModelForCausalLM.from_pretrained(options.model).requires_grad_(False)
    batch = {"input_ids": sequences[:2], "labels": sequences[:2]}

    def step():
        loss = model(**batch).loss + gates_of(model).resource_loss()
        loss.backward()
        gates_of(model).forget_step_()

    found = {}
    for search_over in ("masks", "refitted"):
        attach_(model, request(0.5, search_over=search_over, warmup_steps=0))
        gates = gates_of(model)
        gates.prune_ratio.data.fill_(1 - options.share)
        model.train()
        if search_over == "refitted":
            labelled = [{"input_ids": ids, "labels": ids} for ids in sequences[: options.sequences].split(2)]
            search = RefittedSearch(model, labelled)
            found["first refresh, with the gradient's factors"] = round(seconds(search.refresh_), 1)
            found["refresh"] = round(seconds(search.refresh_), 1)
        step()
        found[f"step over {search_over}"] = round(statistics.median(seconds(step) for _ in range(options.repeats)), 2)
        detach_(model)
    add_row(__file__, {f"{name}, s": value for name, value in found.items()})


if __name__ == "__main__":
    main()
