"""A search in several processes against the same search in one: do ratios and importance agree, and how long is a step?

    python benchmarks/distributed.py [--kinds ddp fsdp2 zero2] [--processes 2] [--pipeline p] [--hidden 256] [--bf16]

Each kind is a launch of this script by accelerate with `recipes/accelerate/KIND.yaml`; the global batch is the same. A
random Llama and random tokens: what differs is the order of sums. On machines without GPUs there is only ddp (gloo).
SGD, because Adam's first steps are signs, which turn a rounding error of a small gradient into a whole step.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tables import add_row
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from hf_dms import DMSConfig, DMSTrainer
from hf_dms.training.distributed import end_processes, is_main

RECIPES = Path(__file__).parent.parent / "recipes" / "accelerate"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", default=["ddp", "fsdp2", "zero2"] if torch.cuda.is_available() else ["ddp"]
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pipeline", default="p")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; it has 4 layers")
    parser.add_argument("--tokens", type=int, default=128, help="per sequence; 2 sequences per process and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--worker", type=Path, help="(what a launch runs) where the results go")
    parser.add_argument("--batch", type=int, default=2, help="(what a launch runs) sequences per process")
    return parser.parse_args()


def search(given: argparse.Namespace) -> None:
    """One process of a search; the main one writes what it found."""
    arguments = TrainingArguments(
        str(given.worker.with_suffix("")), max_steps=given.steps, per_device_train_batch_size=given.batch,
        optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", bf16=given.bf16, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=given.steps, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000, hidden_size=given.hidden, intermediate_size=3 * given.hidden, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4,
        )
    )  # fmt: skip
    ids = torch.randint(1000, (32 * given.steps, given.tokens))  # the same whatever the batch
    config = DMSConfig(target=0.6, layout="per_layer", warmup_steps=4, pipeline=given.pipeline)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = DMSTrainer(model=model, args=arguments, dms_config=config, train_dataset=rows)
    started = time.perf_counter()
    trainer.train()
    seconds = torch.tensor((time.perf_counter() - started) / given.steps)
    pruned = trainer.prune()
    if is_main():
        size = torch.tensor(pruned.num_parameters())
        save_file(trainer.gates.search_state() | {"seconds": seconds, "num_params": size}, given.worker)
    end_processes()


def launch(kind: str, processes: int, batch: int, folder: Path) -> dict[str, torch.Tensor]:
    """Search in one process (kind `single`), or as one of the files in recipes/accelerate says."""
    result = folder / f"{kind}.safetensors"
    start = [sys.executable]
    if kind != "single":
        config = ["--config_file", str(RECIPES / f"{kind}.yaml"), "--num_processes", str(processes)]
        start += ["-m", "accelerate.commands.launch", *config]
    command = [*start, __file__, *sys.argv[1:], "--worker", str(result), "--batch", str(batch)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_file(result)


def main(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone = launch("single", 1, 2 * given.processes, Path(folder))
        importance = [name for name in alone if name.startswith("importance")]
        for kind in ("single", *given.kinds):
            found = alone if kind == "single" else launch(kind, given.processes, 2, Path(folder))
            ratio = float((found["prune_ratio"] - alone["prune_ratio"]).abs().max())
            relative = max(float((found[n] - alone[n]).abs().max() / alone[n].abs().max()) for n in importance)
            processes = 1 if kind == "single" else given.processes
            cells = {"launch": kind, "processes": processes, "largest difference of a ratio": f"{ratio:.1e}"}
            cells |= {"of importance, relative": f"{relative:.1e}", "parameters": int(found["num_params"])}
            cells |= {"s / step": round(float(found["seconds"]), 3)}
            add_row(__file__, cells, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    parsed = options()
    search(parsed) if parsed.worker else main(parsed)
