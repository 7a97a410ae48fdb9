"""Prune a causal language model in a training loop of your own, without a Trainer; weights and prune ratios train.

python examples/own_loop.py [MODEL TEXTS.jsonl STEPS]   # hf-dms fetch smollm2-135m gets the default model
"""

import itertools
import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dms import DMSConfig, attach_, prune, save_pruned

path, file, steps = sys.argv[1:] or ["models/smollm2-135m", "recipes/data/sotu_train.jsonl", "100"]
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
texts = itertools.cycle(load_dataset("json", data_files=file, split="train")["text"])
attach_(model, DMSConfig(target=0.8, prune=("kv", "mlp"), layout="uniform"))
model.train()  # from_pretrained returns a model in evaluation mode, where nothing is learned
gates = model.dms_gates
weights = [parameter for name, parameter in model.named_parameters() if not name.startswith("dms_gates.")]
optimizer = torch.optim.AdamW(
    [{"params": weights, "lr": 1e-5}, {"params": gates.parameters(), "lr": 0.02, "weight_decay": 0}]
)
for step in range(int(steps)):
    gates.decide_(progress=step / int(steps))  # late in the search: whole layers, heads and KV groups
    batch = tokenizer(next(texts), truncation=True, max_length=256, return_tensors="pt").input_ids
    loss = model(batch, labels=batch).loss + gates.resource_loss(progress=step / int(steps))
    loss.backward()
    gates.update_importance_()  # after the backward pass, before the step
    optimizer.step()
    optimizer.zero_grad()
pruned = prune(model)
save_pruned(pruned, "outputs/example/pruned", processor=tokenizer, overwrite=True)
print(f"{model.num_parameters():,} -> {pruned.num_parameters():,} parameters, saved in outputs/example/pruned")
