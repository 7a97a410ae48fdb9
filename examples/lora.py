"""Prune a causal language model while LoRA adapters train beside the prune ratios; the result has them merged.

python examples/lora.py [MODEL TEXTS.jsonl STEPS]       # hf-dms fetch smollm2-135m gets the default model
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer, save_pruned

path, file, steps = sys.argv[1:] or ["models/smollm2-135m", "recipes/data/sotu_train.jsonl", "100"]
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
dense = model.num_parameters()
rows = load_dataset("json", data_files=file, split="train")
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = DMSTrainer(
    model=get_peft_model(model, lora),  # before the gates
    args=TrainingArguments("outputs/example", max_steps=int(steps), learning_rate=2e-4, report_to="none"),
    dms_config=DMSConfig(target=0.8, resource_scope="layers", prune=("kv", "mlp"), layout="uniform"),
    train_dataset=rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text"),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
pruned = trainer.prune()  # a plain model, without adapters
save_pruned(pruned, "outputs/example/pruned", processor=tokenizer, overwrite=True)
print(f"{dense:,} -> {pruned.num_parameters():,} parameters, saved in outputs/example/pruned")
