"""How far the loss jumps from open masks (warm-up) to the first soft ones (every ratio 0), by sharpness of the masks.

    python benchmarks/sharpness.py MODEL_FOLDER

SmolLM2-135M, importance from 8 batches of 2 × 256 tokens, the loss on 4 others, each dim alone and all together.
"""

import sys
from pathlib import Path

import torch
from tables import add_row
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dms import DMSConfig, attach_, detach_
from hf_dms.gating.attach import gates_of
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.generation import load_sequences

MULTIPLES = {"λ = N (the paper's)": 1.0, "λ = 2 N": 2.0, "λ = 8 N": 8.0, "the rule": None}
DATA = Path(__file__).parent.parent / "recipes" / "data" / "sotu_train.jsonl"


@torch.no_grad()
def loss(model, batches):
    return sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches) / len(batches)


def main(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences, _ = load_sequences(DataConfig(path=str(DATA), sequence_length=256), tokenizer)
    batches = sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))].split(2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for dims in (("kv",), ("mlp",), ("hidden",), ("layers",), None):
        cells, importance, open_loss = {}, None, None
        for name, multiple in MULTIPLES.items():
            attach_(model, DMSConfig(target=0.9, prune=dims, warmup_steps=8, sharpness=multiple))
            model.train()
            gates = gates_of(model)
            if importance is None:
                for batch in batches[:8]:
                    model(input_ids=batch, labels=batch).loss.backward()
                    gates.update_importance_()
                    model.zero_grad()
                importance = {dim: gates.raw_importance(dim).clone() for dim in gates.dims}
                gates.num_updates = 0
                open_loss = loss(model, batches[8:12])
            for dim, values in importance.items():
                gates.raw_importance(dim).copy_(values)
            gates.num_updates = 8
            cells[name] = f"{loss(model, batches[8:12]) - open_loss:+.4f}"
            detach_(model)
        add_row(__file__, {"dims": ", ".join(dims or ["all"]), "loss, open": f"{open_loss:.4f}", **cells})


if __name__ == "__main__":
    main(sys.argv[1])
