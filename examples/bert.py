"""Prune a BERT classifier to 60 % of its encoder's parameters while its head is trained.

python examples/bert.py [MODEL SENTENCES.jsonl STEPS]   # hf-dms fetch minilm, hf-dms fetch movie-sentiment
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer, save_pruned

path, file, steps = sys.argv[1:] or ["models/minilm", "models/movie-sentiment/train.jsonl", "200"]
labels = {"negative": 0, "positive": 1}
model = AutoModelForSequenceClassification.from_pretrained(path, label2id=labels, id2label=dict(enumerate(labels)))
tokenizer = AutoTokenizer.from_pretrained(path)
dense = model.num_parameters()
rows = load_dataset("json", data_files=file, split="train").map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=64) | {"labels": labels[row["label"]]},
    remove_columns=["text", "label"],
)
trainer = DMSTrainer(
    model=model,
    args=TrainingArguments("outputs/example", max_steps=int(steps), per_device_train_batch_size=16, report_to="none"),
    dms_config=DMSConfig(target=0.6, resource_scope="layers", prune=("heads", "mlp"), layout="per_layer"),
    train_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
pruned = trainer.prune()
save_pruned(pruned, "outputs/example/pruned", processor=tokenizer, overwrite=True)
print(f"{dense:,} -> {pruned.num_parameters():,} parameters, saved in outputs/example/pruned")
