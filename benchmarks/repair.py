"""Perplexity of cuts of SmolLM2-135M before and after least-squares repair.

    python benchmarks/repair.py MODEL_FOLDER [--targets 0.5 0.8] [--strategies taylor dms] [--steps 200]

MODEL_FOLDER: what `make model` makes. The cuts are those of quality.py, of one seed; repair sees the first sequences of
the same shuffled text. Plans are kept in --plans, each finished row is appended to repair.jsonl at once, and what is
there already is not done again, so that a stopped run goes on.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from quality import HERE, append, cut_by, dms_plan, load_text, one_shot_plan, request, rows_of, shuffled
from transformers import AutoModelForCausalLM

from hf_dms import repair_
from hf_dms.cut.plan import Plan
from hf_dms.tasks.generation import perplexity

# Tokens to repair on and ridge, per strategy; None: as cut.
REPAIRS = {
    "taylor": (None, (16384, 0.01), (16384, 0.001), (16384, 0.1), (65536, 0.01)),
    "dms": (None, (16384, 0.01), (16384, 0.1), (65536, 0.01), (65536, 0.1)),
}


def load_plan(file, make):
    """A plan from a file, or made and written to it."""
    if not file.exists():
        plan = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(plan.kept, file)
    return Plan(torch.load(file))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--strategies", nargs="+", default=["taylor", "dms"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--taylor-batches", type=int, default=24)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--plans", default="outputs/repair-plans")
    parser.add_argument("--results", default=HERE / "repair.jsonl")
    options = parser.parse_args()
    results, seed = Path(options.results), options.seed
    sequences, held_out = load_text(options.model, options.windows)
    sequences = shuffled(sequences, seed)
    model = AutoModelForCausalLM.from_pretrained(options.model)

    def make_plan(strategy, target):
        if strategy == "dms":
            return dms_plan(model, request(target), sequences, options.steps, seed)
        batches = [{"input_ids": batch, "labels": batch} for batch in sequences.split(2)[: options.taylor_batches]]
        return one_shot_plan(model, request(target), strategy, batches)

    for target, strategy in itertools.product(options.targets, options.strategies):
        effort = {"steps": options.steps} if strategy == "dms" else {"batches": options.taylor_batches}
        name = f"{strategy}-{target}-{seed}-{'-'.join(map(str, effort.values()))}.pt"
        for setting in REPAIRS[strategy]:
            tokens, ridge = setting or (0, None)
            key = {"strategy": strategy, "target": target, "seed": seed, **effort, "tokens": tokens, "ridge": ridge}
            key["windows"] = options.windows
            if any(key.items() <= row.items() for row in rows_of(results)):
                continue
            plan = load_plan(Path(options.plans) / name, lambda s=strategy, t=target: make_plan(s, t))
            pruned, start = cut_by(plan, model), time.time()
            if setting is not None:
                text = sequences[: tokens // sequences.shape[1]].split(4)
                repair_(pruned, model, plan, [{"input_ids": ids} for ids in text], ridge=ridge)
            seconds = round(time.time() - start)
            append(key | {"perplexity": round(perplexity(pruned, held_out), 2), "repair_seconds": seconds}, results)


if __name__ == "__main__":
    main()
