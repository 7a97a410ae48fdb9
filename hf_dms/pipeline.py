"""One command: fine-tune if asked, search, cut, verify, retrain if asked, save, measure. What `hf-dms prune` runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from .adapters import with_adapters, with_adapters_of
from .card import base_metadata, model_card
from .checkpoint import check_writable, replace_folder, save_pruned
from .data import Examples, load_examples, load_more_examples
from .distributed import check_launch, make_whole_, on_main, say
from .evaluate import evenly_spaced, example_scores, seconds_per_batch, summary
from .hub import push
from .layouts import Plan
from .masking import copy_search_, detach_, gates_of
from .plans import PLAN_FILE, plan_to_json
from .preflight import (
    check_recipe,
    load_model_config,
    load_processor,
    lora_config,
    model_class,
    packing,
    training_arguments,
)
from .recipe import Recipe
from .repair import repair_
from .report import REPORT, sizes_and_costs, table, versions
from .retrain import train_
from .slicing import plan_of, prune
from .trainer import DMSTrainer
from .training import train_or_resume_

CLAIM = "recipe.json"  # says whose an unfinished folder is
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
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # in a log file a bar is a line per movement
    arguments = training_arguments(recipe, "train", unfinished / "search")
    check_launch(arguments)
    if not on_main(lambda: _may_start(recipe, output, unfinished)):
        return None
    set_seed(arguments.seed)
    processor = load_processor(recipe)
    examples = load_examples(recipe.data, recipe.task, processor, load_model_config(recipe).label2id)

    def measure(name: str, model: PreTrainedModel) -> Tensor:
        say(f"Measuring the {name} model on {report['protocol']} ...")
        return on_main(lambda: score(model, recipe, examples))

    model = dense_model(recipe, examples, unfinished)
    report: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": arguments.seed, "versions": versions()}
    report["protocol"] = f"{len(held_out_examples(recipe, examples))} held-out {examples.unit}"
    scores = {"dense": measure("dense", model.to(arguments.device).eval())}
    summarized = functools.partial(summary, recipe.task.metric)

    searched, pruned, plan = search(model, recipe, examples, report, arguments)
    soft = _scores_on_soft_masks(searched, functools.partial(measure, "searched"))
    report["masks"] = {"soft": summarized(soft, scores["dense"])}
    bound = gates_of(searched).attachment.bound
    detach_(searched)
    model = searched if recipe.lora is None else searched.unload()
    scores["pruned"] = measure("pruned", pruned)
    for step in recover_(pruned, model, plan, recipe, examples, unfinished, processor):
        scores[step] = measure(step, pruned)
    for name, values in scores.items():
        report.setdefault(name, {}).update(summarized(values, None if name == "dense" else scores["dense"]))
    for name, speed in on_main(lambda: _speeds(model, pruned, recipe, examples)).items():
        report[name].update(speed)
    report["sample"] = on_main(lambda: continuation(pruned, processor, recipe))
    report["model_class"] = type(pruned).__name__
    report["seconds"] = round(time.time() - started)
    say(f"Saving to {output} ...")
    kept = plan_to_json(plan, bound, recipe.dms.layout)
    on_main(lambda: _save(pruned, processor, recipe, examples, report, kept))
    on_main(lambda: _tidy(unfinished, output))
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
        arguments = training_arguments(recipe, "finetune", finetuned)
        train_(model, arguments, examples, stage="fine-tuning", max_nonfinite_steps=recipe.dms.max_nonfinite_steps)
    return model


def search(
    dense: PreTrainedModel, recipe: Recipe, examples: Examples, report: dict[str, Any], arguments: Any
) -> tuple[Any, PreTrainedModel, Plan]:
    """Search and cut; the report gets sizes, costs and the course of the search.

    Returns:
        The dense model with the gates of the search, and its adapters if the recipe has some; the pruned model; which
        units of the dense one it holds.
    """
    say("Searching ...")
    lora = lora_config(recipe, "lora")
    model: Any = dense
    if recipe.model.quantization is not None:
        packed = {"quantization_config": packing(recipe, dense.dtype), "device_map": {"": arguments.device}}
        dense.cpu()
        model = _load_model(recipe, examples, **packed)
    model = model if lora is None else with_adapters(model, lora, arguments.seed)
    trainer = DMSTrainer(
        model=model,
        args=arguments,
        dms_config=recipe.dms,
        train_dataset=examples.train,
        eval_dataset=held_out_examples(recipe, examples),
        data_collator=examples.collate,
    )
    train_or_resume_(trainer)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # measure in the model's own precision
    if recipe.model.quantization is not None:
        whole = dense.to(arguments.device) if lora is None else with_adapters_of(model, dense.to(arguments.device))
        copy_search_(model, whole)
        model, pruned = whole, prune(whole, inputs=trainer.example_inputs())
    else:
        pruned = trainer.prune()
    make_whole_(model, arguments.device)
    plan = plan_of(model)
    report |= sizes_and_costs(model, plan, recipe.data.sequence_length)
    report["search"] = [logs for logs in trainer.state.log_history if "task_loss" in logs]
    return model, pruned, plan


def recover_(
    pruned: PreTrainedModel,
    searched: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    examples: Examples,
    folder: Path,
    processor: Any,
) -> Iterator[str]:
    """Repair and retrain the pruned model, in place, as far as the recipe asks for it.

    Args:
        pruned: what the search ended in.
        searched: the model of the search, without gates and adapters.
        plan: which units of it the pruned one holds.
        recipe: how.
        examples: what to repair on, and to train on unless the recipe has other data for that.
        folder: where the checkpoints of the fine-tuning are and those of the retraining go.
        processor: the tokenizer or image processor.

    Yields:
        What the model is after each step: repaired, recovered.
    """
    repair, distillation = recipe.recover.repair, recipe.recover.distillation
    dense = searched  # as long as its weights did not train
    if recipe.dms.pipeline != "p-" and recipe.lora is None and (repair or distillation):
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
        arguments, lora = training_arguments(recipe, "recover", folder / "recover"), lora_config(recipe, "recover.lora")
        if recipe.recover.data is not None:
            examples = load_more_examples(recipe.recover.data, recipe.task, processor, examples)
        options = {"stage": "retraining", "max_nonfinite_steps": recipe.dms.max_nonfinite_steps}
        train_(pruned, arguments, examples, teacher, distillation, lora, **options)
        yield "recovered"


def score(model: PreTrainedModel, recipe: Recipe, examples: Examples) -> Tensor:
    """What each held-out example adds to the metric of the recipe's task, `[examples]`."""
    held_out = held_out_examples(recipe, examples)
    return example_scores(model, recipe.task.metric, held_out, examples.collate, recipe.eval.batch_size)


def held_out_examples(recipe: Recipe, examples: Examples) -> Any:
    """The held-out examples that a recipe measures on."""
    default = SEQUENCES if recipe.model.task == "text-generation" else None
    return evenly_spaced(examples.held_out, recipe.eval.examples or default)


def _load_model(recipe: Recipe, examples: Examples, **packed: Any) -> PreTrainedModel:
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
        **packed,
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
    gates_of(model).train()
    try:
        return measure(model)
    finally:
        gates_of(model).eval()


def _may_start(recipe: Recipe, output: Path, unfinished: Path) -> bool:
    """Check a recipe and claim its folder; False if the result is there already."""
    if (output / REPORT).is_file() and not recipe.output.overwrite:
        if _is_claimed(unfinished, recipe) or not unfinished.exists():
            _tidy(unfinished, output)  # if it was killed when all was saved
        return False
    check_writable(output, recipe.output.overwrite)
    check_recipe(recipe)
    _claim(unfinished, recipe)
    return True


def _claim(unfinished: Path, recipe: Recipe) -> None:
    """Make the folder of an unfinished run, or check that an existing one is this recipe's."""
    mark = unfinished / CLAIM
    if mark.is_file() and not _is_claimed(unfinished, recipe):
        raise ValueError(
            f"{unfinished} holds an unfinished run of another recipe. Run that one again to finish it, "
            "choose another output.path, or delete the folder."
        )
    unfinished.mkdir(parents=True, exist_ok=True)
    mark.with_suffix(".tmp").write_text(_content(recipe))
    os.replace(mark.with_suffix(".tmp"), mark)


def _is_claimed(unfinished: Path, recipe: Recipe) -> bool:
    mark = unfinished / CLAIM
    return mark.is_file() and mark.read_text() == _content(recipe)


def _content(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n"


def _tidy(unfinished: Path, output: Path) -> None:
    """Remove the folder of a run that is finished, but for what TensorBoard reads, which goes into the result."""
    for logs in unfinished.glob("*/runs"):
        shutil.copytree(logs, output / "runs" / logs.parent.name, dirs_exist_ok=True)
    replace_folder(unfinished)
