"""A recipe beside its rival: one-shot Taylor importance at the same budget, with the same `recover` section.

    python benchmarks/recipe.py RECIPE [section.key=value ...] [--strategies dms taylor] [--taylor-batches 100]

Both cut the same dense model (fine-tuned first, if the recipe says so), and both are recovered as the recipe says. The
search of DMS trains weights with pipeline p, so `taylor-longer` gives the rival these steps too, after its cut.
Taylor importance is the mean over batches of the recipe's size at open masks, ranked over all layers together, per
parameter. Needs layout per_layer and no dim but those of each layer. Each finished row is appended to the results at
once with its differences from the dense model and, paired, from the row of DMS; a stopped run goes on.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from quality import cut_by, one_shot_plan
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import set_seed

from hf_dms import detach_
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.cut.plan import PLAN_FILE, load_plan, plan_to_json
from hf_dms.experiment.objects import empty_model, model_class, training_arguments
from hf_dms.experiment.prepare import prepare
from hf_dms.experiment.recipe import load_recipe
from hf_dms.experiment.stages import dense_model, recover_steps, score, search_and_cut
from hf_dms.tasks.evaluate import summary

HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--strategies", nargs="+", default=["dms", "taylor", "taylor-longer"])
    parser.add_argument("--taylor-batches", type=int, default=100)
    parser.add_argument("--results", default=HERE / "recipe.jsonl")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    work = Path(recipe.output.path + ".benchmark")
    work.mkdir(parents=True, exist_ok=True)
    prepared = prepare(recipe, work)
    recipe = prepared.recipe
    examples, arguments = prepared.examples, prepared.arguments["search"]
    meta = empty_model(recipe, prepared.config)

    def measured(name, model):
        """Scores of a row, made once and kept."""
        file = work / f"{name}.safetensors"
        if not file.is_file():
            scores = score(model(), prepared)
            save_file({"scores": scores}, file)
            report(name, scores)
        return load_file(file)["scores"]

    def report(name, scores):
        row = {"recipe": Path(options.recipe).name, "overrides": options.overrides, "row": name}
        row |= summary(
            recipe.task, scores, None if name == "dense" else load_file(work / "dense.safetensors")["scores"]
        )
        rival = work / f"dms{name.removeprefix('taylor-longer').removeprefix('taylor')}.safetensors"
        if name.startswith("taylor") and rival.is_file():
            versus = summary(recipe.task, scores, load_file(rival)["scores"])
            row |= {"from_dms": versus["difference"], "from_dms_stderr": versus["difference_stderr"]}
        print(json.dumps(row), flush=True)
        with Path(options.results).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def dense():
        set_seed(arguments.seed)
        return dense_model(prepared).to(arguments.device).eval()

    def plan_and_cut(strategy):
        """The plan of a strategy and its cut model, made once and kept."""
        folder = work / strategy.partition("-")[0]
        if not folder.is_dir():
            model = dense()
            if strategy == "dms":
                searched = search_and_cut(model, prepared)
                model, pruned, plan = searched.model, searched.pruned, searched.plan
                detach_(model)
            else:
                plan = one_shot_plan(model, recipe.dms, "taylor", taylor_batches())
                pruned = cut_by(plan, model, recipe.dms.layout)
            pruned.save_pretrained(folder)
            (folder / PLAN_FILE).write_text(
                plan_to_json(plan, bind(spec_for(model.config), model), recipe.dms.layout), encoding="utf-8"
            )
        plan, _ = load_plan(folder, bind(spec_for(meta.config), meta))
        return plan, model_class(recipe).from_pretrained(folder).eval()

    def taylor_batches():
        size = arguments.per_device_train_batch_size
        generator = torch.Generator().manual_seed(arguments.seed)
        order = torch.randperm(len(examples.train), generator=generator)[: size * options.taylor_batches]
        chosen = torch.utils.data.Subset(examples.train, order.tolist())
        return list(DataLoader(chosen, batch_size=size, collate_fn=examples.collate))

    def recover(strategy):
        """Measure a cut after each step of the recipe's `recover` section."""
        plan, pruned = plan_and_cut(strategy)
        if strategy == "taylor-longer":
            for key in ("num_train_epochs", "max_steps"):
                if key in (recipe.recover.train or {}):
                    recipe.recover.train[key] += recipe.train[key]
        folder = work / f"{strategy}-recover"
        folder.mkdir(exist_ok=True)
        if recipe.finetune and not (folder / "finetune").exists():
            (folder / "finetune").symlink_to((work / "finetune").resolve())
        searched = dense() if recipe.dms.pipeline == "p-" else None
        own = {name: training_arguments(recipe, name, folder / name) for name in prepared.arguments if name != "search"}
        here = dataclasses.replace(prepared, arguments=own)
        for step in recover_steps(pruned, searched, plan, here):
            measured(f"{strategy}-{step}", lambda: pruned)

    measured("dense", dense)
    for strategy in options.strategies:
        last = "repaired" if recipe.recover.train is None else "recovered"
        if (work / f"{strategy}-{last}.safetensors").is_file():
            continue
        if strategy != "taylor-longer":
            measured(strategy, lambda strategy=strategy: plan_and_cut(strategy)[1])
        recover(strategy)


if __name__ == "__main__":
    main()
