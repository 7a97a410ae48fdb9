"""One command: fine-tune if asked, search, cut, verify, retrain if asked, save, measure. What `hf-dms prune` runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed

from .card import base_metadata, model_card
from .checkpoint import check_writable, save_pruned
from .data import Examples, load_examples
from .distributed import check_launch, make_whole_, on_main, say
from .evaluate import evenly_spaced, example_scores, summary
from .hub import push
from .layouts import Plan
from .masking import detach_, gates_of
from .plans import PLAN_FILE, plan_to_json
from .preflight import check_recipe, load_model_config, load_processor, model_class, training_arguments
from .recipe import Recipe
from .repair import repair_
from .report import REPORT, sizes_and_costs, table, versions
from .retrain import train_
from .slicing import plan_of
from .speed import seconds_per_batch
from .trainer import DMSTrainer
from .training import train_or_resume_

SEQUENCES = 64  # held-out sequences that perplexity is measured on, unless the recipe says otherwise


def run(recipe: Recipe) -> dict[str, Any] | None:
    """Run a recipe to its end, or from where an earlier run of it stopped.

    Args:
        recipe: what to do.

    Returns:
        The content of `dms_report.json`; None if the result was there already.

    Raises:
        ValueError: something is wrong with the recipe, and nothing has been written; or the finished result, which is
            in output.path, could not be pushed.
    """
    output = Path(recipe.output.path)
    unfinished = output.with_name(output.name + ".unfinished")
    started = time.time()
    arguments = training_arguments(recipe, "train", unfinished / "search")
    check_launch(arguments)
    if not on_main(lambda: _may_start(recipe, output, unfinished)):
        return None
    set_seed(arguments.seed)
    processor = load_processor(recipe)
    examples = load_examples(recipe.data, recipe.task, processor, load_model_config(recipe).label2id)

    def measure(model: PreTrainedModel) -> Tensor:
        return on_main(lambda: score(model, recipe, examples))

    model = dense_model(recipe, examples, unfinished)
    report: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": arguments.seed, "versions": versions()}
    report["protocol"] = f"{len(held_out_examples(recipe, examples))} held-out {examples.unit}"
    say(f"Measuring the dense model on {report['protocol']} ...")
    scores = {"dense": measure(model.to(arguments.device).eval())}
    summarized = functools.partial(summary, recipe.task.metric)

    pruned, plan = search(model, recipe, examples, report, arguments)
    report["masks"] = {"soft": summarized(_scores_on_soft_masks(model, measure), scores["dense"])}
    bound = gates_of(model).attachment.bound
    detach_(model)
    scores["pruned"] = measure(pruned)
    for step in recover_(pruned, model, plan, recipe, examples, unfinished):
        scores[step] = measure(pruned)
    for name, values in scores.items():
        report.setdefault(name, {}).update(summarized(values, None if name == "dense" else scores["dense"]))
    for name, speed in on_main(lambda: _speeds(model, pruned, recipe, examples)).items():
        report[name].update(speed)
    report["sample"] = on_main(lambda: continuation(pruned, processor, recipe))
    report["model_class"] = type(pruned).__name__
    report["seconds"] = round(time.time() - started)
    kept = plan_to_json(plan, bound, recipe.dms.layout)
    on_main(lambda: _save(pruned, processor, recipe, examples, report, kept))
    on_main(lambda: shutil.rmtree(unfinished))
    say("\n" + table(report))
    if recipe.hub.repo_id:
        say(f"\nPushed to {on_main(lambda: push(output, **dataclasses.asdict(recipe.hub)))}")
    return report


# ---- the steps -------------------------------------------------------------------------------------------------------
def dense_model(recipe: Recipe, examples: Examples, folder: Path) -> PreTrainedModel:
    """The dense model of a recipe: loaded (or randomly initialised for pipeline np), and fine-tuned if asked.

    Args:
        recipe: which one.
        examples: what to fine-tune on, and the names of its classes.
        folder: where the checkpoints of a fine-tuning are, or go.

    Raises:
        ValueError: the checkpoint lacks weights of the model, and the recipe does not train them.
    """
    finetuned = folder / "finetune"
    model = _load_model(recipe, examples)
    if recipe.finetune:
        say("Fine-tuning the dense model ...")
        train_(model, training_arguments(recipe, "finetune", finetuned), examples)
    return model


def search(
    model: PreTrainedModel, recipe: Recipe, examples: Examples, report: dict[str, Any], arguments: Any
) -> tuple[PreTrainedModel, Plan]:
    """Search and cut; the model keeps its gates, the report gets sizes, costs and the course of the search.

    Returns:
        The pruned model, and which units of the dense one it holds.
    """
    trainer = DMSTrainer(
        model=model,
        args=arguments,
        dms_config=recipe.dms,
        train_dataset=examples.train,
        data_collator=examples.collate,
    )
    train_or_resume_(trainer)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # measure in the model's own precision
    pruned = trainer.prune()
    make_whole_(model, arguments.device)
    plan = plan_of(model)
    report |= sizes_and_costs(model, plan, recipe.data.sequence_length)
    report["search"] = [logs for logs in trainer.state.log_history if "task_loss" in logs]
    return pruned, plan


def recover_(
    pruned: PreTrainedModel, searched: PreTrainedModel, plan: Plan, recipe: Recipe, examples: Examples, folder: Path
) -> Iterator[str]:
    """Repair and retrain the pruned model, in place, as far as the recipe asks for it.

    Args:
        pruned: what the search ended in.
        searched: the model of the search, without gates.
        plan: which units of it the pruned one holds.
        recipe: how.
        examples: what to repair and train on.
        folder: where the checkpoints of the fine-tuning are and those of the retraining go.

    Yields:
        What the model is after each step: repaired, recovered.
    """
    repair, distillation = recipe.recover.repair, recipe.recover.distillation
    dense = searched  # as long as its weights did not train
    if recipe.dms.pipeline != "p-" and (repair or distillation):
        dense = dense_model(recipe, examples, folder).to(pruned.device).eval()
    if repair is not None:
        say("Repairing the pruned model ...")
        rows = DataLoader(evenly_spaced(examples.train, repair.examples), 4, collate_fn=examples.collate)
        batches = [{name: tensor.to(pruned.device) for name, tensor in batch.items()} for batch in rows]
        repair_(pruned, dense, plan, batches, ridge=repair.ridge)
        yield "repaired"
    if recipe.recover.train:
        say("Retraining the pruned model ...")
        teacher = dense if distillation else None
        train_(pruned, training_arguments(recipe, "recover", folder / "recover"), examples, teacher, distillation)
        yield "recovered"


def score(model: PreTrainedModel, recipe: Recipe, examples: Examples) -> Tensor:
    """What each held-out example adds to the metric of the recipe's task, `[examples]`."""
    held_out = held_out_examples(recipe, examples)
    return example_scores(model, recipe.task.metric, held_out, examples.collate, recipe.eval.batch_size)


def held_out_examples(recipe: Recipe, examples: Examples) -> Any:
    """The held-out examples that a recipe measures on."""
    default = SEQUENCES if recipe.model.task == "text-generation" else None
    return evenly_spaced(examples.held_out, recipe.eval.examples or default)


def _load_model(recipe: Recipe, examples: Examples) -> PreTrainedModel:
    dtype = recipe.model.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    config = load_model_config(recipe, examples.labels)
    if recipe.dms.pipeline == "np":
        dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        options = {"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}
        return model_class(recipe).from_config(config, dtype=dtype, **options)
    model, loading = model_class(recipe).from_pretrained(
        recipe.model.path,
        config=config,
        revision=recipe.model.revision,
        dtype=dtype,
        attn_implementation=recipe.model.attn_implementation,
        output_loading_info=True,
    )
    if loading["missing_keys"] and not recipe.finetune:
        raise ValueError(
            f"model.path: '{recipe.model.path}' has no weights for {', '.join(sorted(loading['missing_keys']))}, which "
            "would be random. Add a finetune section (finetune.max_steps or finetune.num_train_epochs) to train them "
            "before the search."
        )
    return model


def _speeds(
    model: PreTrainedModel, pruned: PreTrainedModel, recipe: Recipe, examples: Examples
) -> dict[str, dict[str, float]]:
    """Speeds of both models for the report: tokens, texts or images per second of one batch."""
    count = min(recipe.eval.batch_size, len(examples.held_out))
    batch = examples.collate([examples.held_out[i] for i in range(count)])
    amount = batch["input_ids"].numel() if recipe.model.task == "text-generation" else count
    key, _ = recipe.task.speed
    seconds = seconds_per_batch([model, pruned], batch)
    return {name: {key: amount / each} for name, each in zip(("dense", "pruned"), seconds)}


def _save(
    pruned: PreTrainedModel, processor: Any, recipe: Recipe, examples: Examples, report: dict[str, Any], plan: str
) -> None:
    """Write the finished folder."""
    output = Path(recipe.output.path)
    save_pruned(
        pruned,
        output,
        processor=processor,
        inputs=examples.collate([examples.held_out[0]]),
        files={
            REPORT: json.dumps(report, indent=2) + "\n",
            PLAN_FILE: plan,
            "README.md": model_card(
                report, recipe.hub.repo_id or output.name, base_metadata(recipe.model.path, recipe.model.revision)
            ),
        },
        overwrite=recipe.output.overwrite,
    )


def continuation(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> str:
    """What the pruned model makes of the recipe's prompt (greedy), prompt included; empty without a prompt."""
    if recipe.model.task != "text-generation" or not recipe.eval.prompt:
        return ""
    inputs = tokenizer(recipe.eval.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=recipe.eval.new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _scores_on_soft_masks(model: PreTrainedModel, measure: Any) -> Tensor:
    """Scores on the soft masks that the search ended with; what hard masks differ by is the cost of rounding."""
    model.eval()
    model.dms_gates.train()
    try:
        return measure(model)
    finally:
        model.dms_gates.eval()


def _may_start(recipe: Recipe, output: Path, unfinished: Path) -> bool:
    """Check a recipe and claim its folder; False if the result is there already."""
    if (output / REPORT).is_file() and not recipe.output.overwrite:
        return False
    check_writable(output, recipe.output.overwrite)
    check_recipe(recipe)
    _claim(unfinished, recipe)
    return True


def _claim(unfinished: Path, recipe: Recipe) -> None:
    """Make the folder of an unfinished run, or check that an existing one is this recipe's."""
    mark = unfinished / "recipe.json"
    content = json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n"
    if mark.is_file() and mark.read_text() != content:
        raise ValueError(
            f"{unfinished} holds an unfinished run of another recipe. Run that one again to finish it, "
            "choose another output.path, or delete the folder."
        )
    unfinished.mkdir(parents=True, exist_ok=True)
    mark.write_text(content)
