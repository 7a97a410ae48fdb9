"""A search step against a plain Trainer step of the same model, batch and precision: time and peak memory.

    python benchmarks/step_overhead.py [--layers 2] [--shape smollm2] [--batch 2] [--tokens 256] [--dtype float32]
    python benchmarks/step_overhead.py --layers 2 4 8 --tokens 128 256 512    # how it grows
    python benchmarks/step_overhead.py --shape resnet-50 --batch 8 --tokens 64   # images of 64 × 64 pixels

Both run in one process, in turns, a few steps each, so that a noisy machine treats them alike; the ratio is that of the
median step times. A step is forward, backward, clipping and AdamW on all weights, all four dims gated, after warm-up.
Peak memory is the most that tensors held at any moment of a step: on a GPU as torch.cuda counts it, on a CPU as its
profiler does.
"""

import argparse
import gc
import itertools
import time

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_dms import DMSConfig, DMSTrainer

SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}  # fmt: skip
NETWORKS = {"resnet-50": ResNetConfig}  # of images, with all of its layers


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainer(options, kind, steps):
    torch.manual_seed(0)
    if options.shape in NETWORKS:
        side = options.tokens
        config = NETWORKS[options.shape](image_size=side)
        model = ResNetForImageClassification._from_config(config, dtype=getattr(torch, options.dtype))
        dataset = [{"pixel_values": torch.randn(3, side, side), "labels": 0} for _ in range(64)]
    else:
        config = LlamaConfig(num_hidden_layers=options.layers, **SHAPES[options.shape])
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, options.dtype))
        tokens = torch.randint(0, config.vocab_size, (64, options.tokens))
        dataset = [{"input_ids": row, "labels": row} for row in tokens]
    if options.lora:
        lora = LoraConfig(r=options.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        "unused", max_steps=steps, per_device_train_batch_size=options.batch, logging_steps=10**6, report_to=[],
        save_strategy="no", disable_tqdm=True, learning_rate=1e-5, dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    if kind == "plain":
        return Trainer(model=model, args=arguments, train_dataset=dataset)
    dms = DMSConfig(target=0.5, layout="per_layer", warmup_steps=0, pipeline="p-" if options.frozen else "p")
    trainer = DMSTrainer(model=model, args=arguments, dms_config=dms, train_dataset=dataset)
    return trainer


def run(options, kind, steps):
    trainer, times = make_trainer(options, kind, steps), StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.seconds[1:]


def peak_bytes(options, kind):
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(options, kind, 3)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(options, kind, 3)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--shape", choices=[*SHAPES, *NETWORKS], nargs="+", default=["smollm2"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="of a sequence; pixels of an image's side")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--frozen", action="store_true", help="freeze the weights in the search (p-)")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters that train in place of the weights")
    asked = parser.parse_args()
    for shape, layers, tokens in itertools.product(asked.shape, asked.layers, asked.tokens):
        compare(argparse.Namespace(**(vars(asked) | {"shape": shape, "layers": layers, "tokens": tokens})))


def compare(options):
    seconds = {"plain": [], "search": []}
    for _ in range(options.rounds):
        for kind in seconds:
            seconds[kind] += run(options, kind, 6)
    median = {kind: sorted(times)[len(times) // 2] for kind, times in seconds.items()}
    peak = {kind: peak_bytes(options, kind) for kind in seconds}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    layers = "" if options.shape in NETWORKS else f" × {options.layers} layers"
    model = f"{options.shape}{layers}, {options.dtype}"
    print(
        f"| {device} | {model} | {options.batch} × {options.tokens}{' px' * (options.shape in NETWORKS)} | "
        f"{median['plain']:.3f} s | {median['search']:.3f} s | {median['search'] / median['plain']:.3f} | "
        f"{peak['plain'] / 2**20:.0f} MiB | {peak['search'] / 2**20:.0f} MiB | {peak['search'] / peak['plain']:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
