"""Perplexity of SmolLM2-135M cut by structure that counts on its repair, and repaired; on two texts.

    python benchmarks/refit.py MODEL_FOLDER [--runs obs-0.5 ...] [--seed 0] [--own 0.5] [--weights equal]

MODEL_FOLDER: what `make model` makes. Cuts, calibration text and held-out windows are those of quality.py; the second
text, which no method sees, is Python's language reference (`pydoc_data.topics`), 64 windows of 256 tokens. RUNS lists
what is run. `--own` is the share of the repair's sequences that the dense model writes itself (`own_texts`);
`--weights` says how positions count: by their stream, as in `repair_`, or alike, as before. `tokens` counts every use:
search, gradients, each walk over the layers, and repair. What the dense model reads while it writes texts does not
count. Plans are kept in --plans, each finished row is appended to refit.jsonl at once, and what is there already is not
done again, so that a stopped run goes on.
"""

import argparse
import functools
import pydoc_data.topics
import time
from pathlib import Path

import torch
from quality import HERE, append, cut_by, dms_plan, load_text, one_shot_plan, request, rows_of, shuffled
from repair import load_plan
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dms import one_shot_obs_plan, repair_
from hf_dms.refit import curvature
from hf_dms.tasks.evaluate import evenly_spaced
from hf_dms.tasks.generation import pack, perplexity
from hf_dms.tasks.own_texts import own_texts

REPAIR = 16384
SAME_CUT = ("run", "seed", "windows")  # rows that are equal in these have one cut
# name: strategy, its options; tokens that it uses before the repair
RUNS = {
    "taylor": ("taylor", {"batches": 24}, 24 * 512),
    "obs": ("obs", {"sequences": 24, "walks": 2}, 3 * 24 * 256),
    "refitted": ("refitted", {"steps": 80}, 80 * 512 + 4 * 24 * 256 + 96 * 256),
}


def second_text(folder, windows):
    """Windows of 256 tokens of Python's language reference."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    return evenly_spaced(ids[: len(ids) // 256 * 256].view(-1, 256), windows)


def labelled(sequences, size=4):
    return [{"input_ids": ids, "labels": ids} for ids in sequences.split(size)]


def with_own(sequences, model, folder, share, file):
    """Sequences, a share of which the dense model writes; kept in a file."""
    count = round(share * len(sequences))
    if not count:
        return sequences
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(own_texts(model, tokenizer, count, sequences.shape[1])[0], file)
    ids = tokenizer(torch.load(file), verbose=False)["input_ids"]
    own = pack(torch.tensor([token for text in ids for token in [*text, tokenizer.eos_token_id]]), sequences.shape[1])
    both = torch.cat([sequences[: len(sequences) - min(count, len(own))], own[:count]])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(0))]


def make_plan(model, strategy, options, target, sequences, seed):
    if strategy == "taylor":
        return one_shot_plan(model, request(target), "taylor", labelled(sequences[: 2 * options["batches"]], 2))
    if strategy == "obs":
        batches = labelled(sequences[: options["sequences"]])
        return one_shot_obs_plan(model, request(target), batches, walks=options["walks"])
    config = request(target, search_over="refitted", warmup_steps=0)
    return dms_plan(model, config, sequences, options["steps"], seed)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--runs", nargs="+", default=[f"{name}-{target}" for target in (0.5, 0.8) for name in RUNS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repair", type=int, default=REPAIR, help="tokens to repair on")
    parser.add_argument("--ridge", type=float, default=0.1)
    parser.add_argument("--own", type=float, default=0.0, help="share of the repair's sequences")
    parser.add_argument("--weights", choices=["stream", "equal"], default="stream")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--plans", default="outputs/refit-plans")
    parser.add_argument("--results", default=HERE / "refit.jsonl")
    options = parser.parse_args()
    results, seed = Path(options.results), options.seed
    if options.weights == "equal":
        curvature.position_weights = lambda aim, relative: torch.ones_like(aim[..., 0])
    sequences, held_out = load_text(options.model, options.windows)
    texts = {"perplexity": held_out, "second_text": second_text(options.model, options.windows)}
    sequences = shuffled(sequences, seed)
    for run in options.runs:
        name, _, target = run.rpartition("-")
        strategy, settings, used = RUNS[name]
        key = {"run": run, "strategy": strategy, **settings, "target": float(target), "seed": seed}
        key |= {"repair_tokens": options.repair, "ridge": options.ridge, "windows": options.windows}
        key |= {"own": options.own, "weights": options.weights}
        if any(key.items() <= row.items() for row in rows_of(results)):
            continue
        model, start = AutoModelForCausalLM.from_pretrained(options.model), time.time()
        file = Path(options.plans) / f"{run}-{seed}.pt"
        made = not file.exists()
        make = functools.partial(make_plan, model, strategy, settings, float(target), sequences, seed)
        plan = load_plan(file, make)
        row = key | {"plan_seconds": round(time.time() - start) if made else None}
        pruned = cut_by(plan, model)
        row["layer_params"] = sum(p.numel() for n, p in pruned.named_parameters() if ".layers." in n)
        as_cut = [each["as_cut"] for each in rows_of(results) if all(each[name] == key[name] for name in SAME_CUT)]
        row["as_cut"] = as_cut[0] if as_cut else round(perplexity(pruned, held_out), 2)
        text = sequences[: options.repair // sequences.shape[1]]
        text = with_own(
            text, model, options.model, options.own, Path(options.plans) / f"own-{len(text)}-{options.own}.pt"
        )
        start = time.time()
        repair_(pruned, model, plan, [{"input_ids": ids} for ids in text.split(4)], ridge=options.ridge)
        row |= {"repair_seconds": round(time.time() - start), "tokens": used + options.repair}
        append(row | {name: round(perplexity(pruned, text), 2) for name, text in texts.items()}, results)


if __name__ == "__main__":
    main()
