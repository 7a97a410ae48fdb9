"""What keeping freed memory saves and costs: processor time, page faults and peak memory under settings of malloc.

    python benchmarks/kept_memory.py models/smollm2-135m [--only search] [--settings default kept] [--runs 2]

Stages of recipes/quickstart.yaml, each run in a process of its own, the settings in turns: the search as the recipe has
it; the training after the cut with the dense model as teacher, on 8 × 256 tokens, whose logits are larger; and the same
with two layers and 4 × 256 tokens, where hardly anything but logits is large. One thread. Seconds and page faults are
those of the process, per step, without the first steps. The peak is the most resident memory that the system saw
(`ru_maxrss`), loading included. Cells are medians over the runs; `time` and `memory` are relative to the first setting.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
NEVER = 2**64 - 1  # the largest trim threshold
KEPT = {"MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": NEVER}
SETTINGS = {
    "default": {},
    "kept": KEPT,
    "kept, trimmed above 1 GiB": KEPT | {"MALLOC_TRIM_THRESHOLD_": 2**30},
    "kept, small blocks joined": KEPT | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"},
    "kept below 32 MiB": {"MALLOC_MMAP_THRESHOLD_": 2**25, "MALLOC_TRIM_THRESHOLD_": NEVER},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": 1},
}  # variables of the environment: glibc's, and torch's for huge pages


@dataclass(frozen=True)
class Stage:
    recover: bool
    batch: int
    first: int  # steps before the measured ones
    steps: int
    layers: int | None = None  # that are left of the model


STAGES = {
    "search": Stage(False, 2, 4, 20),
    "recovery": Stage(True, 8, 2, 4),
    "recovery of two layers": Stage(True, 4, 2, 8, layers=2),
}


def usage():
    return resource.getrusage(resource.RUSAGE_SELF)


def train(stage, path):
    """Train in this process, and print what a step took and the peak."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(stage, path, Path(folder))
        marks = []
        trainer.add_callback(marking(marks, (stage.first, stage.first + stage.steps)))
        trainer.train()
    begin, end = marks
    found = {"user": end.ru_utime - begin.ru_utime, "system": end.ru_stime - begin.ru_stime}
    found |= {"faults": end.ru_minflt - begin.ru_minflt}
    found = {name: value / stage.steps for name, value in found.items()}
    print(json.dumps(found | {"peak": usage().ru_maxrss * 1024, "bfloat16": trainer.args.bf16}))


def make_trainer(stage, path, folder):
    from hf_dms import DMSTrainer, prune
    from hf_dms.experiment.prepare import prepare
    from hf_dms.experiment.recipe import load_recipe
    from hf_dms.experiment.stages import load_model
    from hf_dms.training.finetune import DistillationTrainer

    section = "recover" if stage.recover else "train"
    words = [f"model.path={path}", f"output.path={folder / 'out'}", "train.save_strategy=no"]
    words += [f"{section}.max_steps={stage.first + stage.steps}"]
    words += [f"{section}.per_device_train_batch_size={stage.batch}"]
    words += ["recover.distillation.weight=1.0"] if stage.recover else []
    prepared = prepare(load_recipe(str(RECIPE), words), folder)
    model, recipe, examples = load_model(prepared), prepared.recipe, prepared.examples
    same = {"train_dataset": examples.train, "data_collator": examples.collate}
    if not stage.recover:
        return DMSTrainer(model=model, args=prepared.arguments["search"], dms_config=recipe.dms, **same)
    pruned = prune(model, recipe.dms)
    for each in (model, pruned):
        del each.model.layers[stage.layers or len(each.model.layers) :]
    return DistillationTrainer(
        model=pruned, args=prepared.arguments["recover"], teacher=model, distillation=recipe.recover.distillation,
        max_nonfinite_steps=recipe.dms.max_nonfinite_steps, **same,
    )  # fmt: skip


def marking(marks, steps):
    """A callback that appends the process's usage after each of `steps`."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in steps:
                marks.append(usage())

    return Marks()


def in_a_process(name, path, setting):
    """What a step of a stage takes under a setting, measured in a process of its own."""
    there = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    there |= {key: str(value) for key, value in SETTINGS[setting].items()}
    command = [sys.executable, __file__, path, "--stage", name]
    return json.loads(subprocess.check_output(command, env=there, text=True).splitlines()[-1])


def compare(name, path, settings, runs):
    from tables import add_row  # torch stays out of the processes that are measured

    found = {setting: [] for setting in settings}
    for _ in range(runs):
        for setting in settings:
            found[setting].append(in_a_process(name, path, setting))
            print(name, setting, found[setting][-1], flush=True)
    median = {
        setting: {key: statistics.median(run[key] for run in each) for key in ("user", "system", "faults", "peak")}
        for setting, each in found.items()
    }
    stage, base = STAGES[name], median[settings[0]]
    for setting, each in median.items():
        precisions = sorted({"bfloat16" if run["bfloat16"] else "float32" for run in found[setting]})
        cells = {"stage": name, "batch": f"{stage.batch} × 256", "computes in": " and ".join(precisions)}
        cells |= {"memory of malloc": setting, "user, s": round(each["user"], 2), "system, s": round(each["system"], 2)}
        cells |= {"time": round((each["user"] + each["system"]) / (base["user"] + base["system"]), 3)}
        cells |= {"page faults": round(each["faults"]), "peak, MiB": round(each["peak"] / 2**20)}
        cells |= {"memory": round(each["peak"] / base["peak"], 3), "steps": stage.steps, "runs": runs}
        add_row(__file__, cells)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--only", choices=list(STAGES), nargs="+", default=list(STAGES))
    parser.add_argument("--settings", choices=list(SETTINGS), nargs="+", default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--stage", choices=list(STAGES), help="internal: one stage, in this process")
    options = parser.parse_args()
    if options.stage:
        return train(STAGES[options.stage], options.model)
    for name in options.only:
        compare(name, options.model, options.settings, options.runs)


if __name__ == "__main__":
    main()
