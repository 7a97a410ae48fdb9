"""What a p- search of Llama-7B needs, on a randomly initialised one: speed and memory do not depend on the weights.

    python benchmarks/llama_7b.py [--batch 4] [--tokens 512] [--steps 300]
    python benchmarks/llama_7b.py --lora 8 --batch 16 --tokens 256    # a training of adapters, without a search

With a GPU the whole model is searched, and time and peak memory are measured. Without one, models of one and of two
such layers run on the CPU, and the memory of 32 layers is computed from theirs. No time is measured then.
"""

import argparse
import time

import torch
from step_overhead import make_trainer, peak_bytes
from tables import add_row

DEPTH = 32


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lora", type=int, default=0, help="train adapters of this rank, without a search")
    options = parser.parse_args()
    options.shape, options.dtype, options.frozen = "llama-7b", "bfloat16", True
    kind = "plain" if options.lora else "search"
    cells = {"what": "LoRA" if options.lora else "search", "batch": f"{options.batch} × {options.tokens}"}
    cells |= {"activation checkpointing": "yes" if options.checkpointing else "no"}
    if torch.cuda.is_available():
        options.layers = DEPTH
        trainer, start = make_trainer(options, kind, options.steps), time.time()
        trainer.train()
        peak, seconds = torch.cuda.max_memory_allocated() / 1e9, time.time() - start
        cells |= {f"{DEPTH} layers, measured, GB": round(peak, 1), "steps": options.steps, "seconds": round(seconds)}
        add_row(__file__, cells, "cuda")
        return
    peaks = []
    for options.layers in (1, 2):
        peaks.append(peak_bytes(options, kind) / 1e9)
        cells[f"{options.layers} layers, measured, GB"] = round(peaks[-1], 2)
    whole = peaks[0] + (DEPTH - 1) * (peaks[1] - peaks[0])
    add_row(__file__, cells | {f"{DEPTH} layers, computed, GB": round(whole, 1)})


if __name__ == "__main__":
    main()
