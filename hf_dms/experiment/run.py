"""The stages of `hf-dms prune` in order: fine-tune if asked, search, cut, verify, recover if asked, save, measure."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..checkpoint.folders import check_writable, only_writer
from ..checkpoint.hub import push
from ..checkpoint.save import save_pruned
from ..config import SEARCH
from ..cut.plan import PLAN_FILE, plan_to_json
from ..cut.plans import PLANS_FILE, plans_to_json
from ..gating.attach import detach_, gates_of
from ..report.card import base_metadata, model_card
from ..report.numbers import REPORT, as_written, network_of, notes, report_table, size_bars, to_json
from ..report.page import PAGE, render
from ..report.report import Report
from ..tasks.evaluate import summary
from ..training.distributed import check_launch, print_on_main, run_on_main
from .finished import is_finished
from .objects import training_arguments
from .own_data import with_own_texts
from .prepare import Prepared, prepare, unfinished_folder
from .recipe import Recipe
from .recover import recover_in_words
from .sizes import folder_of, save_sizes
from .stages import dense_model, protocol_of, recover_steps, report_of, score, scores_on_soft_masks, search_and_cut
from .unfinished import CLAIM, claim, hashes_by_key, read_claim, remove_unfinished


def run(recipe: Recipe) -> dict[str, Any] | None:
    """Run a recipe, or continue where an earlier run of it stopped.

    Args:
        recipe: the recipe.

    Returns:
        The content of `dms_report.json`; None if the result exists already.

    Raises:
        ValueError: the recipe has a mistake (then nothing has been written), another process runs it, or the finished
            result in output.path could not be pushed.
    """
    output, unfinished = Path(recipe.output.path), unfinished_folder(recipe)
    started = time.time()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # in a log file, every update of a bar would be a line
    # Before anything is shared between processes: in a broken launch each would take itself for the main one.
    check_launch(training_arguments(recipe, "train", unfinished / "search"))
    with contextlib.ExitStack() as stack:
        # The working folder is locked: two runs of one recipe would share its checkpoints.
        run_on_main(lambda: stack.enter_context(only_writer(unfinished)))
        prepared = _start(recipe, output, unfinished)
        if prepared is None:
            return None
        if prepared.recipe.recover != recipe.recover:
            print_on_main("\n  ".join(["After the cut (recover):", *recover_in_words(prepared.recipe)]))
        # After the checks, so that their random numbers do not matter.
        set_seed(prepared.arguments["search"].seed)
        report, pruned, plans = _experiment(with_own_texts(prepared))
        print_on_main(f"Saving to {output} ...")
        report.seconds = round(time.time() - started)
        report.data = run_on_main(lambda: hashes_by_key(read_claim(unfinished)))  # other machines may lack the folder
        written = run_on_main(lambda: _save(pruned, prepared, report, plans))
        run_on_main(lambda: remove_unfinished(unfinished, output))
        print_on_main("\n" + "\n\n".join([report_table(written), size_bars(written), *notes(written)]))
        # Last of all: a push that fails loses nothing, and `hf-dms push` can repeat it.
        if recipe.hub.repo_id:
            print_on_main(f"\nPushed to {run_on_main(lambda: push(output, **dataclasses.asdict(recipe.hub)))}")
        return written


def _start(recipe: Recipe, output: Path, unfinished: Path) -> Prepared | None:
    """Check a recipe, first in the main process, which takes over the working folder; None if the result exists."""
    built: list[Prepared] = []

    def start() -> bool:
        if is_finished(recipe, output, unfinished):
            return False
        check_writable(output, recipe.output.overwrite)
        # If an earlier run is continued, some of these sizes may be written already.
        for size in recipe.output.sizes if not (unfinished / CLAIM).exists() else ():
            check_writable(folder_of(recipe, size), recipe.output.overwrite)
        built.append(prepare(recipe))
        claim(unfinished, recipe)
        return True

    if not run_on_main(start):
        return None
    # The other processes prepare only now, so that a mistake in the recipe is found, and printed, once.
    return built[0] if built else prepare(recipe)


def _experiment(prepared: Prepared) -> tuple[Report, PreTrainedModel, dict[str, str]]:
    """Run all stages, and measure the model after each.

    Returns:
        The report, without its time; the pruned model; the files of the plans, name → content.
    """
    recipe, examples = prepared.recipe, prepared.examples
    network = network_of(recipe.to_dict())
    samples: list[Any] = recipe.task.samples(examples, prepared.processor, recipe.eval)

    def measured(name: str, model: PreTrainedModel, text: str | None = None) -> Tensor:
        words = network if name == "dense" else f"{name} model"
        print_on_main(f"Measuring the {words} on {protocol_of(prepared) if text is None else text} ...")
        return run_on_main(lambda: score(model, prepared, text))

    def measure_(name: str, model: PreTrainedModel) -> None:
        for text in (None, *prepared.texts):
            scores.setdefault(text, {})[name] = measured(name, model, text)

    def answered(name: str, model: PreTrainedModel) -> list[Any]:
        return run_on_main(lambda: recipe.task.answers(samples, name, model, prepared.processor, examples, recipe.eval))

    # Single scores are kept, not means: later models are compared with the dense one example by example.
    scores: dict[str | None, dict[str, Tensor]] = {}  # by text (None is the held-out data) and model
    dense = dense_model(prepared).to(prepared.arguments["search"].device).eval()
    measure_("dense", dense)
    # Before the search, which may change the weights.
    samples = answered("dense", dense)
    searched = search_and_cut(dense, prepared)
    masks: Any = None
    if recipe.dms.strategy == SEARCH:
        soft = scores_on_soft_masks(searched.model, functools.partial(measured, "searched"))
        masks = {"soft": summary(recipe.task, soft, scores[None]["dense"])}
    bound = gates_of(searched.model).attachment.bound
    plans = {PLAN_FILE: plan_to_json(searched.plan, bound, recipe.dms.layout)}
    plans |= {PLANS_FILE: plans_to_json(searched.plans, bound, recipe.dms.layout)} if searched.plans else {}
    # From here on the dense model runs without gates.
    detach_(searched.model)
    dense = searched.model if recipe.lora is None else searched.model.unload()  # FSDP or bitsandbytes replace it
    pruned = searched.pruned
    measure_("pruned", pruned)
    for step in recover_steps(pruned, dense, searched.plan, prepared):
        measure_(step, pruned)
    save_sizes(dense, prepared, searched.plans, scores, measured, _save)
    samples = answered(list(scores[None])[-1], pruned)
    more = dict(masks=masks, outcome=searched.outcome, search=searched.logs, samples=samples)
    return report_of(prepared, dense, pruned, searched.costs, scores, **more), pruned, plans


def _save(pruned: PreTrainedModel, prepared: Prepared, report: Report, plans: dict[str, str]) -> dict[str, Any]:
    """Write the finished folder; returns the content of `dms_report.json`."""
    recipe, examples = prepared.recipe, prepared.examples
    output, written = Path(recipe.output.path), as_written(report)
    name = recipe.hub.repo_id or output.name
    # With np nothing of the base's weights is in the result.
    base = {} if recipe.dms.pipeline == "np" else base_metadata(recipe.model.path, recipe.model.revision)
    card = model_card(written, name, base)
    page = render(written, pruned.config.to_dict(), name)
    save_pruned(
        pruned,
        output,
        processor=prepared.processor,
        inputs=examples.collate([examples.held_out[0]]),
        files={REPORT: to_json(written), PAGE: page, "README.md": card} | plans,
        overwrite=recipe.output.overwrite,
    )
    return written
