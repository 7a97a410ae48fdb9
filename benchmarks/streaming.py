"""Peak memory of `hf-dms prune --plan`, which cuts a checkpoint tensor by tensor, against the size of its shards.

    python benchmarks/streaming.py [--layers 6] [--shard 1GB] [--keep 0.6] [--folder DIR]

Makes a randomly initialised Llama with the widths of Llama-7B and a random plan (`keep` of every dim's units, other
ones in each layer) in a temporary folder, which goes at the end: 3 GB for 6 layers, and as much again for the result.
Every step is a process of its own; its peak is the most resident memory that the system saw (`ru_maxrss`), mapped pages
of files included. The constant is what the same command needs for a model of some kilobytes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}


def make(folder, layers, shard, keep, tiny):
    """A random dense model and a random plan for it, in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_dms.archs.bind import bind
    from hf_dms.archs.registry import spec_for
    from hf_dms.cut.plan import PLAN_FILE, Plan, plan_to_json

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **(TINY if tiny else WIDTHS))
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    bound = bind(spec_for(config), model)
    kept = {
        name: tuple(
            torch.randperm(bound.sizes[name])[: max(round(keep * bound.sizes[name]), 1)].sort().values
            for _ in range(bound.rows(name))
        )
        for name in bound.spec.prunable
    }
    (folder / PLAN_FILE).write_text(plan_to_json(Plan(kept), bound, "per_layer"), encoding="utf-8")


def load(folder):
    """Load the whole dense model into memory, in a process of its own."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    print(
        sum(float(parameter.detach().flatten()[::1024].float().sum()) for parameter in model.parameters())
    )  # touch the pages


def peak(*command):
    """Peak resident bytes of a Python process, and its seconds of CPU time."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed.")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def cut(folder):
    out = folder / "out"
    words = [f"model.path={folder}", f"output.path={out}", "output.overwrite=true"]
    return *peak("-m", "hf_dms", "prune", "--plan", folder, *words), sizes(out)


def sizes(folder):
    return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--shard", default="1GB")
    parser.add_argument("--keep", type=float, default=0.6, help="of the units of every dim")
    parser.add_argument("--folder", help="where the temporary folder goes")
    parser.add_argument("--step", choices=["make", "make-tiny", "load"], help="internal: one step, in this process")
    parser.add_argument("--at", type=Path, help="internal")
    options = parser.parse_args()
    if options.step == "load":
        return load(options.at)
    if options.step:
        return make(options.at, options.layers, options.shard, options.keep, options.step == "make-tiny")
    same = ("--layers", options.layers, "--shard", options.shard, "--keep", options.keep)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        dense, tiny = Path(temporary, "dense"), Path(temporary, "tiny")
        peak(__file__, "--step", "make-tiny", "--at", tiny, *same)
        peak(__file__, "--step", "make", "--at", dense, *same)
        constant, _, _ = cut(tiny)
        streamed, seconds, written = cut(dense)
        loaded, _ = peak(__file__, "--step", "load", "--at", dense)
        shards = sizes(dense)
    sizes_of = {"files": sum(shards), "largest shard": max(shards), "written": sum(written), "peak": streamed}
    sizes_of |= {"constant": constant, "the model loaded": loaded}
    cells = {"kept of each dim": options.keep, "layers": options.layers}
    cells |= {f"{name}, MiB": round(size / 2**20) for name, size in sizes_of.items()}
    cells |= {"(peak - constant) / shard": round((streamed - constant) / max(shards), 2), "CPU seconds": round(seconds)}
    from tables import add_row  # torch stays out of the processes that are measured

    add_row(__file__, cells)


if __name__ == "__main__":
    main()
