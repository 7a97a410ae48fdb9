"""torch-pruning itself beside our versions of its criteria: MLP widths of SmolLM2-135M, the same number of units.

    python -m venv rival && rival/bin/pip install --constraint constraints.txt -e . torch-pruning==1.6.1
    rival/bin/python benchmarks/rival_torch_pruning.py MODEL_FOLDER [--targets 0.8 0.5] [--batches 24]

MODEL_FOLDER: what `make model` makes. torch-pruning runs in an environment of its own and is no dependency of ours.
Both see the same gradients, of the first batches of 2 × 256 tokens (seed 0), and drop equally many MLP channels of all
layers together, as many as our exact budget asks for; attention stays whole. `agreement` is the share of units kept by
both. Perplexity is on quality.py's windows and on refit.py's second text, right after the cut. Each finished row is
appended to rivals.jsonl; rows that are there already are skipped.

torch-pruning divides each layer's scores by their mean (its default normalizer); `normalizer: none` is our
criterion computed by another program. It shows that both compute the same thing.
"""

from importlib.metadata import version

import torch
import torch_pruning
from quality import append, rows_of
from rivals import options_and_texts
from transformers import AutoModelForCausalLM

from hf_dms import DMSConfig, attach_, choose_, plan_of, prune
from hf_dms.tasks.generation import perplexity

OURS = {"taylor": "taylor_elements", "magnitude": "magnitude"}


def ours(folder, criterion, target, batches):
    """The pruned model, and the MLP units that each layer keeps."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = DMSConfig(target=target, resource_scope="layers", prune=("mlp",), layout="per_layer", pipeline="p-")
    attach_(model, config)
    choose_(model, OURS[criterion], batches)
    kept = [set(units.tolist()) for units in plan_of(model).kept["mlp"]]
    return prune(model), kept


def theirs(folder, criterion, normalizer, num_kept, batches):
    """The same by torch-pruning, with `num_kept` MLP channels left in all layers together."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False
    before = [layer.mlp.gate_proj.weight.detach().clone() for layer in model.model.layers]
    if criterion == "taylor":
        importance = torch_pruning.importance.GroupTaylorImportance(normalizer=normalizer)
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    inner = [module for layer in model.model.layers for module in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    others = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in inner]
    total = sum(map(len, before))
    pruner = torch_pruning.pruner.BasePruner(
        model, {"input_ids": batches[0]["input_ids"][:1, :8]}, importance, global_pruning=True,
        pruning_ratio=1 - num_kept / total, ignored_layers=others, root_module_types=[torch.nn.Linear],
    )  # fmt: skip
    pruner.step()
    kept = []
    for rows, layer in zip(before, model.model.layers):
        places = {row.numpy().tobytes(): place for place, row in enumerate(rows)}
        kept.append({places[row.detach().numpy().tobytes()] for row in layer.mlp.gate_proj.weight})
    return model, kept


def main():
    options, texts, batches = options_and_texts("rivals.jsonl")
    for target in options.targets:
        for criterion in OURS:
            key = {"criterion": criterion, "target": target, "batches": options.batches, "windows": options.windows}
            done = {(row["tool"], row["normalizer"]) for row in rows_of(options.results) if key.items() <= row.items()}
            asked = [("hf_dms", None), ("torch-pruning", None), ("torch-pruning", "mean")]
            if done >= set(asked):
                continue
            pruned, kept = ours(options.model, criterion, target, batches)
            num_kept = sum(map(len, kept))
            for tool, normalizer in asked:
                if (tool, normalizer) in done:
                    continue
                same = kept
                if tool != "hf_dms":
                    pruned, same = theirs(options.model, criterion, normalizer, num_kept, batches)
                row = key | {"tool": tool, "version": version(tool), "normalizer": normalizer}
                row |= {"units": sum(map(len, same)), "narrowest": min(map(len, same)), "widest": max(map(len, same))}
                row |= {"agreement": round(sum(len(a & b) for a, b in zip(kept, same)) / num_kept, 4)}
                append(
                    row | {name: round(perplexity(pruned.eval(), text), 2) for name, text in texts.items()},
                    options.results,
                )


if __name__ == "__main__":
    main()
