"""One command: fine-tune if asked, search, cut, verify, retrain if asked, save, measure. What `hf-dms prune` runs."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..checkpoint.hub import push
from ..checkpoint.save import save_pruned
from ..cut.plan import PLAN_FILE, plan_to_json
from ..gating.attach import detach_, gates_of
from ..measure.versions import versions
from ..report.card import base_metadata, model_card
from ..report.numbers import REPORT, as_written, table, to_json
from ..report.page import PAGE, render
from ..tasks.evaluate import summary
from ..tasks.registry import load_examples
from ..tasks.task import Examples
from ..training.distributed import check_launch, on_main, say
from .prepare import load_model_config, load_processor, training_arguments
from .recipe import Recipe
from .stages import dense_model, held_out_examples, recover_, score, scores_on_soft_masks, search, speeds
from .unfinished import may_start, tidy


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
    if not on_main(lambda: may_start(recipe, output, unfinished)):
        return None
    set_seed(arguments.seed)
    processor = load_processor(recipe)
    new_head = recipe.dms.pipeline == "np"
    examples = load_examples(recipe.data, recipe.task, processor, load_model_config(recipe), new_head=new_head)
    report, pruned, plan = _experiment(recipe, processor, examples, arguments, unfinished)
    say(f"Saving to {output} ...")
    report["seconds"] = round(time.time() - started)
    written = on_main(lambda: _save(pruned, processor, recipe, examples, report, plan))
    on_main(lambda: tidy(unfinished, output))
    say("\n" + table(written))
    if recipe.hub.repo_id:
        say(f"\nPushed to {on_main(lambda: push(output, **dataclasses.asdict(recipe.hub)))}")
    return written


def _experiment(
    recipe: Recipe, processor: Any, examples: Examples, arguments: Any, folder: Path
) -> tuple[dict[str, Any], PreTrainedModel, str]:
    """All stages, the model measured after each.

    Args:
        recipe: what to do.
        processor: the tokenizer or image processor.
        examples: what to train and measure on.
        arguments: `TrainingArguments` of the search.
        folder: where checkpoints are, or go.

    Returns:
        The report, without the time that it took; the pruned model; the content of `dms_plan.json`.
    """
    report: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": arguments.seed, "versions": versions()}
    report["protocol"] = f"{len(held_out_examples(recipe, examples))} held-out {examples.unit}"
    report["samples"] = recipe.task.samples(examples, processor, recipe.eval)

    def measure(name: str, model: PreTrainedModel) -> Tensor:
        say(f"Measuring the {name} model on {report['protocol']} ...")
        return on_main(lambda: score(model, recipe, examples))

    def ask_(name: str, model: PreTrainedModel) -> None:
        answers = functools.partial(
            recipe.task.answers, report["samples"], name, model, processor, examples, recipe.eval
        )
        report["samples"] = on_main(answers)

    dense = dense_model(recipe, examples, folder).to(arguments.device).eval()
    scores = {"dense": measure("dense", dense)}
    ask_("dense", dense)
    searched, pruned, plan = search(dense, recipe, examples, report, arguments)
    soft = scores_on_soft_masks(searched, functools.partial(measure, "searched"))
    kept = plan_to_json(plan, gates_of(searched).attachment.bound, recipe.dms.layout)
    detach_(searched)
    dense = searched if recipe.lora is None else searched.unload()  # as FSDP or bitsandbytes left it
    scores["pruned"] = measure("pruned", pruned)
    for step in recover_(pruned, dense, plan, recipe, examples, folder, processor):
        scores[step] = measure(step, pruned)
    ask_(list(scores)[-1], pruned)
    summarized = functools.partial(summary, recipe.task)
    report["masks"] = {"soft": summarized(soft, scores["dense"])}
    for name, values in scores.items():
        report.setdefault(name, {}).update(summarized(values, None if name == "dense" else scores["dense"]))
    for name, speed in on_main(lambda: speeds(dense, pruned, recipe, examples)).items():
        report[name].update(speed)
    return report | {"layout": recipe.dms.layout, "model_class": type(pruned).__name__}, pruned, kept


def _save(
    pruned: PreTrainedModel, processor: Any, recipe: Recipe, examples: Examples, report: dict[str, Any], plan: str
) -> dict[str, Any]:
    """Write the finished folder; returns the content of `dms_report.json`."""
    output, written = Path(recipe.output.path), as_written(report)
    name = recipe.hub.repo_id or output.name
    card = model_card(written, name, base_metadata(recipe.model.path, recipe.model.revision))
    page = render(written, pruned.config.to_dict(), name)
    save_pruned(
        pruned,
        output,
        processor=processor,
        inputs=examples.collate([examples.held_out[0]]),
        files={REPORT: to_json(written), PAGE: page, PLAN_FILE: plan, "README.md": card},
        overwrite=recipe.output.overwrite,
    )
    return written
