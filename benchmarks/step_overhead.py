"""A search step against a plain Trainer step of the same model, batch and precision: time and peak memory.

    python benchmarks/step_overhead.py [--layers 2] [--shape smollm2] [--batch 2] [--tokens 256] [--dtype float32]
    python benchmarks/step_overhead.py --layers 2 4 8 --tokens 128 256 512    # how it grows
    python benchmarks/step_overhead.py --shape resnet-50 yolos-tiny --batch 8 --tokens 64 224  # of an image's side

Both run in one process, in turns, a few steps each, so that a noisy machine treats them alike. The ratio is that of the
median step times. A step is forward, backward, clipping and AdamW on all weights, all four dims gated, after warm-up.
Peak memory is the most that tensors held at any moment of a step: on a GPU as torch.cuda counts it, on a CPU as its
profiler does. The target is constant. A falling target is rounded to a plan at each 5 % that it passes: a
whole search does that ten times, and these few steps would do it at every step.
"""

import argparse
import gc
import itertools
import time

import torch
from peft import LoraConfig, get_peft_model
from tables import add_row
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
    default_data_collator,
)

from hf_dms import DMSConfig, DMSTrainer
from hf_dms.experiment.allocator import keep_freed_memory_

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
NETWORKS = ("resnet-50", "yolos-tiny")  # of images, with all of their layers
YOLOS_TINY = dict(
    hidden_size=192, intermediate_size=768, num_attention_heads=3, use_mid_position_embeddings=False, num_labels=91,
)  # fmt: skip


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = clock()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(clock() - self.start)


def clock():
    """Seconds of the wall clock with a GPU, else of this process: other processes disturb that less."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainer(options, kind, steps):
    torch.manual_seed(0)
    if options.shape in NETWORKS:
        model, dataset = images(options.shape, options.tokens, getattr(torch, options.dtype))
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
        return Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    dms = DMSConfig(
        target=0.5, layout="per_layer", warmup_steps=0, pipeline="p-" if options.frozen else "p",
        target_schedule="constant",
    )  # fmt: skip
    trainer = DMSTrainer(model=model, args=arguments, dms_config=dms, train_dataset=dataset, data_collator=collate)
    return trainer


def images(shape, side, dtype):
    """A network of images, and images for it: classes for a ResNet, five boxes each for a detector."""
    pixels = torch.randn(64, 3, side, side)
    if shape == "resnet-50":
        model = ResNetForImageClassification._from_config(ResNetConfig(image_size=side), dtype=dtype)
        return model, [{"pixel_values": image, "labels": 0} for image in pixels]
    model = YolosForObjectDetection._from_config(YolosConfig(image_size=[side, side], **YOLOS_TINY), dtype=dtype)
    boxes = {"class_labels": torch.arange(5), "boxes": 0.2 + 0.5 * torch.rand(5, 4)}
    return model, [{"pixel_values": image, "labels": boxes} for image in pixels]


def collate(examples):
    """The default collator, except that boxes stay a list."""
    if not isinstance(examples[0].get("labels"), dict):
        return default_data_collator(examples)
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": [example["labels"] for example in examples]}


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
    keep_freed_memory_()  # as `hf-dms prune` does, for the plain steps too
    for shape, layers, tokens in itertools.product(asked.shape, asked.layers, asked.tokens):
        compare(argparse.Namespace(**(vars(asked) | {"shape": shape, "layers": layers, "tokens": tokens})))


def compare(options):
    seconds = {"plain": [], "search": []}
    for _ in range(options.rounds):
        for kind in seconds:
            seconds[kind] += run(options, kind, 6)
    median = {kind: sorted(times)[len(times) // 2] for kind, times in seconds.items()}
    peak = {kind: peak_bytes(options, kind) for kind in seconds}
    layers = "" if options.shape in NETWORKS else f" × {options.layers} layers"
    cells = {"model": f"{options.shape}{layers}, {options.dtype}"}
    cells |= {"batch": f"{options.batch} × {options.tokens}{' px' * (options.shape in NETWORKS)}"}
    cells |= {f"{kind}, s": round(seconds, 3) for kind, seconds in median.items()}
    cells |= {"time": round(median["search"] / median["plain"], 3)}
    cells |= {f"{kind} peak, MiB": round(size / 2**20) for kind, size in peak.items()}
    cells |= {"memory": round(peak["search"] / peak["plain"], 3), "steps": len(seconds["plain"])}
    add_row(__file__, cells, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
