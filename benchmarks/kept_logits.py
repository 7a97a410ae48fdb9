"""What keeping the teacher's logits saves, when a pruned MiniLM learns from its dense model over several epochs.

    python benchmarks/kept_logits.py models/minilm models/movie-sentiment/train.jsonl [--epochs 2 3]

The same training twice per number of epochs: with the dense model's logits computed once per example (taught.py), and
with a pass of the dense model at every step. CPU seconds of one thread, so that a busy machine counts less, the passes
that compute the kept logits among them. Both must end in the same weights but for rounding.
"""

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from tables import add_row
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_dms import DMSConfig, prune
from hf_dms.tasks.task import Examples
from hf_dms.training import taught
from hf_dms.training.distillation import DistillationConfig
from hf_dms.training.finetune import train_

LENGTH = 64


def load(tokenizer, file, count):
    with Path(file).open(encoding="utf-8") as texts:
        lines = [json.loads(line) for line in islice(texts, count)]
    rows = [
        dict(tokenizer(line["text"], padding="max_length", truncation=True, max_length=LENGTH))
        | {"label": int(line["label"] == "positive")}
        for line in lines
    ]
    return Examples(rows, rows, default_data_collator, ("negative", "positive"), "texts")


def trained(dense, examples, epochs, limit):
    """CPU seconds of a training, and the weights that it ends with; logits are kept up to `limit` bytes."""
    model = prune(dense, DMSConfig(target=0.4, resource_scope="layers", prune=("heads", "mlp"), layout="per_layer"))
    taught.MOST_BYTES = limit
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-5, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        start = time.process_time()
        train_(model, arguments, examples, dense, DistillationConfig())
        return time.process_time() - start, torch.cat([p.detach().flatten() for p in model.parameters()])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--examples", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    dense = AutoModelForSequenceClassification.from_pretrained(options.model)
    dense.config.hidden_dropout_prob = dense.config.attention_probs_dropout_prob = 0.0
    examples = load(AutoTokenizer.from_pretrained(options.model), options.texts, options.examples)
    for epochs in options.epochs:
        each, there = trained(dense, examples, epochs, 0)
        kept, here = trained(dense, examples, epochs, 2**30)
        add_row(
            __file__,
            {
                "model": "MiniLM at 0.4 of its encoder", "batch": f"32 × {LENGTH}", "epochs": epochs,
                "teacher at every step, s": round(each, 1), "logits kept, s": round(kept, 1),
                "time": round(kept / each, 3), "largest difference of a weight": f"{(here - there).abs().max():.0e}",
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
