"""Repair of a cut hidden size, with and without the maps that read the stream.

    python benchmarks/readers.py [--shares 0.9 0.75] [--results benchmarks/readers.jsonl]

models/minilm and models/smollm2-135m are cut to a share of their hidden size, by the norms of the rows that write each
unit, and repaired on 640 sentences and on 48 × 256 tokens of State of the Union addresses. `error` is the squared error
of MiniLM's last hidden states on 160 other sentences, as a share of their squares. Perplexity is on 16 windows of
quality.py. `seconds` are of processor time. Finished rows are appended; rows that are there already are skipped.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from quality import HERE, append, load_text, rows_of, shuffled
from refit import labelled
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_dms import repair_
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.cut.plan import Plan
from hf_dms.cut.slicing import cut
from hf_dms.refit.readers import Readers
from hf_dms.tasks.generation import perplexity

MODELS = {"minilm": AutoModelForMaskedLM, "smollm2-135m": AutoModelForCausalLM}


def smollm2(folder):
    """Batches to repair on, and what measures a cut model."""
    sequences, held_out = load_text(folder, 16)
    return labelled(shuffled(sequences, 0)[:48]), lambda _, pruned, units: {"perplexity": perplexity(pruned, held_out)}


def minilm(folder):
    """The same for sentences."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(name, count):
        lines = Path("models/movie-sentiment", name).read_text(encoding="utf-8").splitlines()[:count]
        texts, options = [json.loads(line)["text"] for line in lines], dict(padding="max_length", truncation=True)
        for i in range(0, count, 16):
            yield dict(tokenizer(texts[i : i + 16], max_length=64, return_tensors="pt", **options))

    @torch.no_grad()
    def error(dense, pruned, units):
        lost = total = 0.0
        for batch in batches("heldout.jsonl", 160):
            counts = batch["attention_mask"].bool()
            wanted = dense.base_model(**batch).last_hidden_state[..., units][counts]
            lost += float((wanted - pruned.base_model(**batch).last_hidden_state[counts]).square().sum())
            total += float(wanted.square().sum())
        return {"error": lost / total}

    return list(batches("train.jsonl", 640)), error


def largest(bound, dense, share):
    """The share of the hidden units with the largest norms of the rows that write them."""
    weights = dense.state_dict()
    maps = (name for name, each in bound.params.items() if len(each.axes) == 2 and each.axes[0] == ("hidden",))
    norms = sum(weights[name].square().sum(1) for name in maps)
    return norms.topk(int(share * len(norms))).indices.sort().values


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.75])
    parser.add_argument("--results", type=Path, default=HERE / "readers.jsonl")
    options = parser.parse_args()
    refit = Readers.refit_
    for name, auto in MODELS.items():
        batches, measure = {"smollm2-135m": smollm2, "minilm": minilm}[name](f"models/{name}")
        dense = auto.from_pretrained(f"models/{name}").eval()
        bound = bind(spec_for(dense.config), dense)
        for share in options.shares:
            units = largest(bound, dense, share)
            plan = Plan({"hidden": (units,)})
            for way in ("cut", "writers", "writers and readers"):
                key = {"model": name, "share": share, "way": way}
                if any(key.items() <= row.items() for row in rows_of(options.results)):
                    continue
                pruned, begun = cut(dense, bound, plan, "per_layer"), time.process_time()
                Readers.refit_ = refit if way == "writers and readers" else lambda *args: None
                if way != "cut":
                    repair_(pruned, dense, plan, batches)
                row = key | {"hidden": len(units), "seconds": round(time.process_time() - begun)}
                append(row | {k: round(v, 4) for k, v in measure(dense, pruned, units).items()}, options.results)


if __name__ == "__main__":
    main()
