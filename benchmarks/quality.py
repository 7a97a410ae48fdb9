"""Perplexity of SmolLM2-135M cut by DMS, by one-shot Taylor importance and by weight magnitude, at the same budget.

    python benchmarks/quality.py MODEL_FOLDER [--targets 0.8 0.5] [--seeds 0 1 2] [--steps 200]

MODEL_FOLDER: what `make model` makes. Weights frozen, no repair, no training; layout per_layer, kv and mlp; the budget
is a fraction of the parameters of the layers. Every strategy sees the same calibration text (`--steps` batches of
2 × 256 tokens for DMS, the first `--taylor-batches` of the same for Taylor) and the same windows. Each finished
row is appended to the results at once; rows that are there already are skipped, so that a stopped run goes on.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer, attach_, detach_
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.cut.prune import magnitude_importance, make_plan, plan_of
from hf_dms.cut.slicing import cut
from hf_dms.gating.attach import gates_of
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.evaluate import evenly_spaced
from hf_dms.tasks.generation import as_dataset, load_sequences, perplexity

HERE = Path(__file__).parent
DATA = HERE.parent / "recipes" / "data"


def global_sizes(gates, importance, target):
    """Sizes of a cut that drops the least important units of all layers together until the budget is met.

    Importance is divided by the parameters that a unit costs; each row keeps one unit at least.
    """
    dense = gates.dense_sizes()
    per_unit = {
        name: float(gates.count(dense) - gates.count(dense | {name: dense[name] - 1})) / gates.dims[name].rows
        for name in gates.dims
    }
    scores = {n: importance[n].sort(-1).values / per_unit[n] for n in gates.dims}
    for score in scores.values():
        score[:, -1] = torch.inf  # one unit of each row stays
    low, high = 0, sum(score.numel() for score in scores.values())
    everything = torch.cat([score.flatten() for score in scores.values()]).sort().values
    while low < high:  # the lowest threshold that fits
        middle = (low + high) // 2
        sizes = {n: (score > everything[middle]).sum(-1) for n, score in scores.items()}
        fits = gates.resource(dense | {n: size.float() for n, size in sizes.items()}) <= target
        low, high = (low, middle) if fits else (middle + 1, high)
    return {n: (score > everything[low]).sum(-1) for n, score in scores.items()}


def taylor_importance(model, batches):
    """Mean of (m·g)² over batches at open masks: the importance of DMS without its moving average.

    `batches`: keyword arguments of forward passes, with labels.
    """
    gates = gates_of(model)
    total = {name: torch.zeros_like(gates.raw_importance(name)) for name in gates.dims}
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        for name, term in gates._taylor.items():
            total[name] += term.square() / len(batches)
        gates._taylor.clear()
    model.eval()
    return total


def one_shot_plan(model, config, strategy, batches=()):
    """The plan of a cut by weight magnitude, or by Taylor importance over batches, all layers ranked together."""
    attach_(model, config)
    gates = gates_of(model)
    try:
        gates.schedule = type(gates.schedule)(target=config.target, warmup_steps=10**9)  # masks stay open
        if strategy == "magnitude":
            importance = magnitude_importance(gates.attachment.bound, model, gates)
        else:
            importance = taylor_importance(model, batches)
        sizes = global_sizes(gates, importance, config.target)
        for name, values in importance.items():
            gates.raw_importance(name).copy_(values)
        return make_plan(gates, sizes)
    finally:
        detach_(model)


def one_shot(model, config, strategy, batches=()):
    return cut_by(one_shot_plan(model, config, strategy, batches), model, config.layout)


def dms_plan(model, config, sequences, steps, seed):
    """The plan that a search ends with."""
    arguments = TrainingArguments(
        "unused", max_steps=steps, per_device_train_batch_size=2, seed=seed, logging_steps=10, report_to=[],
        save_strategy="no", use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DMSTrainer(model=model, args=arguments, dms_config=config, train_dataset=as_dataset(sequences))
    trainer.train()
    plan = plan_of(model)
    detach_(model)
    return plan


def dms(model, config, sequences, steps, seed):
    return cut_by(dms_plan(model, config, sequences, steps, seed), model, config.layout)


def request(target, **options):
    """The request: KV groups and MLP widths per layer, a share of the layers' parameters."""
    return DMSConfig(
        target=target, resource="params", resource_scope="layers", prune=("kv", "mlp"), layout="per_layer",
        pipeline="p-", **options,
    )  # fmt: skip


def load_text(folder, windows):
    """Sequences to calibrate on, and sequences to measure on."""
    data = DataConfig(
        path=str(DATA / "sotu_train.jsonl"), held_out=str(DATA / "sotu_heldout.jsonl"), sequence_length=256
    )
    sequences, held_out = load_sequences(data, AutoTokenizer.from_pretrained(folder))
    return sequences, evenly_spaced(held_out, windows)


def shuffled(sequences, seed):
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))]


def cut_by(plan, model, layout="per_layer"):
    return cut(model, bind(spec_for(model.config), model), plan, layout)


def rows_of(results):
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def append(row, results):
    print(row, flush=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=["magnitude", "taylor", "dms"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--taylor-batches", type=int, default=24)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--results", default=HERE / "quality.jsonl")
    parser.add_argument("--dms", default="{}", help="further options of DMSConfig, as JSON")
    options = parser.parse_args()
    results = Path(options.results)
    done = rows_of(results)
    sequences, held_out = load_text(options.model, options.windows)

    def measure(strategy, target, seed, make, **settings):
        key = {"strategy": strategy, "target": target, "seed": seed, "windows": options.windows, **settings}
        if any(key.items() <= row.items() for row in done):
            return
        start = time.time()
        pruned = make()
        row = key | {"perplexity": round(perplexity(pruned, held_out), 2), "seconds": round(time.time() - start)}
        row["layer_params"] = sum(p.numel() for n, p in pruned.named_parameters() if ".layers." in n)
        append(row, results)

    def dense():
        return AutoModelForCausalLM.from_pretrained(options.model)

    measure("dense", 1.0, 0, dense)
    for seed, target, strategy in itertools.product(options.seeds, options.targets, options.strategies):
        if strategy == "magnitude" and seed != options.seeds[0]:
            continue  # it uses no data
        text, config = shuffled(sequences, seed), request(target, **json.loads(options.dms))
        if strategy == "dms":
            make = functools.partial(dms, config=config, sequences=text, steps=options.steps, seed=seed)
            settings = {"steps": options.steps, "dms": options.dms}
        else:
            batches = text.split(2)[: options.taylor_batches] if strategy == "taylor" else ()
            batches = [{"input_ids": batch, "labels": batch} for batch in batches]
            make = functools.partial(one_shot, config=config, strategy=strategy, batches=batches)
            settings = {"batches": len(batches)} if strategy == "taylor" else {}
        measure(strategy, target, seed, lambda make=make: make(dense()), **settings)


if __name__ == "__main__":
    main()
