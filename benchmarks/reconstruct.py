"""Perplexity of SmolLM2-135M cut to half by one-shot Taylor, repaired, and its sub-blocks trained; on two texts.

    python benchmarks/reconstruct.py MODEL_FOLDER [--device cuda] [--target 0.5]

MODEL_FOLDER: what `make model` makes. The cut looks at 96 sequences of 256 tokens; text, held-out windows and second
text are those of refit.py. Each finished row is appended to reconstruct.jsonl, and what is there already is not done
again.
"""

import argparse
import time
from pathlib import Path

import torch
from quality import HERE, append, cut_by, load_text, one_shot_plan, request, rows_of, shuffled
from refit import labelled, second_text
from transformers import AutoModelForCausalLM

from hf_dms import repair_
from hf_dms.measure.versions import device_name
from hf_dms.refit import reconstruct
from hf_dms.tasks.generation import perplexity

SETTINGS = [  # tokens of the repair, passes over them, rate
    (65536, 0, 0.003),
    (65536, 4, 0.003),
    (65536, 4, 0.01),
    (65536, 4, 0.03),
    (65536, 16, 0.003),
    (65536, 16, 0.01),
    (16384, 16, 0.01),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--results", default=HERE / "reconstruct.jsonl")
    options = parser.parse_args()
    results, device = Path(options.results), torch.device(options.device)
    sequences, held_out = load_text(options.model, 64)
    texts = {"first": held_out, "second": second_text(options.model, 64)}
    sequences = shuffled(sequences, 0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    batches = [{key: ids.to(device) for key, ids in batch.items()} for batch in labelled(sequences[:96], 2)]
    plan = one_shot_plan(model, request(options.target), "taylor", batches)
    for tokens, epochs, rate in SETTINGS:
        row = {"target": options.target, "tokens": tokens, "size": 4, "epochs": epochs, "rate": rate}
        if any(row.items() <= known.items() for known in rows_of(results)):
            continue
        reconstruct.RATE = rate
        pruned, start = cut_by(plan, model), time.time()
        text = [{"input_ids": ids.to(device)} for ids in sequences[: tokens // 256].split(4)]
        repair_(pruned, model, plan, text, epochs=epochs)
        row |= {"seconds": round(time.time() - start)}
        row |= {name: round(perplexity(pruned, windows.to(device)), 2) for name, windows in texts.items()}
        append(row | {"machine": device_name(device)}, results)


if __name__ == "__main__":
    main()
