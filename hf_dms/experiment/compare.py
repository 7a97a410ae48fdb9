"""`hf-dms compare RECIPE`: several ways to choose structure on the same work, a row for each finished cell.

A cell is a strategy, a target and a seed. All cells share the dense model, the examples and their order, the count of
the budget, rounding, repair and the training after it. The examples that each cell sees are counted, and
`compare.tokens` makes them equal. Each row is appended to `rows.jsonl` in output.path when it is finished, so an
interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from ..archs.bind import bind
from ..archs.registry import spec_for
from ..checkpoint.folders import only_writer
from ..config import SEARCH
from ..cut.plan import Plan
from ..cut.prune import plan_of
from ..errors import HfDmsError
from ..gating.attach import detach_, gates_of
from ..gating.gates_for import build_gates
from ..gating.rounding import check_target
from ..gating.supernet import fresh_weights_
from ..measure.speed import peak_resident_bytes
from ..refit.repair import repair_
from ..report.comparison import write_comparison
from ..strategies.one_shot import check_choice
from ..tasks.evaluate import example_scores, summary
from ..tasks.task import Examples
from ..training.finetune import train_
from ..training.progress import Countdown
from ..training.refitting import examples_beside_the_steps
from ..training.trainer import DMSTrainer
from .allocator import give_back_freed_memory_
from .cells import Cell, cells_of, recipe_of
from .choose import Batches, cut_by_criterion, examples_of, shuffled
from .objects import empty_model, lora_config, training_arguments
from .own_data import with_own_texts
from .prepare import Prepared, load_texts, prepare
from .recipe import Recipe
from .rows import append_row, fingerprint, provenance, read_rows
from .stages import choice_changes_weights, dense_model

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    Attributes:
        prepared: the recipe (model, data, recover section, budget) and its data.
        texts: held-out examples to measure on, by name.
        folder: folder for rows, and for checkpoints of the training after the cut.
        dense_scores: scores of the dense model, by text; the first cell fills it.
    """

    prepared: Prepared
    texts: dict[str, Any]
    folder: Path
    dense_scores: dict[str, Any] = field(default_factory=dict)


def compare(recipe: Recipe) -> str:
    """Make the rows of a recipe's `compare` section that are not there yet.

    Args:
        recipe: a recipe with a `compare` section.

    Returns:
        The table of all rows, as Markdown. It is also in `table.md`, its numbers in `table.json`, a plot in
        `quality.png`.

    Raises:
        HfDmsError: there is no such section, a strategy is not possible, the task's metric is not a mean over
            examples, or another process makes the rows.
    """
    if recipe.task.of_all is not None:
        raise HfDmsError(
            f"model.task: compare pairs the scores of single examples, and the metric of {recipe.task.name} is one of "
            "all examples together. Run a recipe per strategy (dms.strategy), and compare their reports."
        )
    cells = cells_of(recipe)
    folder = Path(recipe.output.path)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        return _compare(recipe, cells, folder)


def _compare(recipe: Recipe, cells: list[Cell], folder: Path) -> str:
    setup = _setup(recipe, folder)
    cells = cells_of(dataclasses.replace(recipe, dms=setup.prepared.recipe.dms))  # with its target as a fraction
    for cell in cells:
        _check(setup, cell)
    set_seed(setup.prepared.arguments["search"].seed)  # the first cell may give the dense model a new head
    about = fingerprint(recipe)
    rows = [row for row in read_rows(folder / ROWS) if row["work"] == about]
    done = [row["cell"] for row in rows]
    for cell in cells:
        if cell.key in done:
            continue
        print(f"{cell.strategy}, target {cell.target:g}, seed {cell.seed} ...", flush=True)
        row = {"work": about, "cell": cell.key} | run_cell(setup, cell) | provenance(_device(setup))
        append_row(folder / ROWS, row)
        rows.append(row)
    wanted = [cell.key for cell in cells]
    return write_comparison([row for row in rows if row["cell"] in wanted], folder)


def _setup(recipe: Recipe, folder: Path) -> Setup:
    # Checked at the lowest target: if that can be reached, all can.
    lowest = dataclasses.replace(recipe.dms, target=min(recipe.compare.targets or [recipe.dms.target]))
    prepared = with_own_texts(prepare(dataclasses.replace(recipe, dms=lowest), folder / "dense"))
    texts = {"held out": prepared.held_out}
    texts |= load_texts(
        recipe, "compare.texts", recipe.compare.texts, prepared.processor, prepared.config, prepared.examples
    )
    return Setup(prepared, texts, folder)


def _check(setup: Setup, cell: Cell) -> None:
    """Check that a cell can be made, before the first one is.

    Raises:
        HfDmsError: its target cannot be reached, or its strategy is not defined for what it prunes.
    """
    recipe, config = recipe_of(setup.prepared.recipe, cell), setup.prepared.config
    model = empty_model(recipe, config)
    bound = bind(spec_for(config), model)
    try:
        for section in ("train", "recover") if recipe.recover.train is not None else ("train",):
            training_arguments(recipe, section, setup.folder)
        gates = build_gates(bound, model, recipe.dms, device=torch.device("cpu"))
        check_target(gates, bound, recipe.dms, config)
        if recipe.dms.strategy != SEARCH:
            check_choice(recipe.dms, gates, bound)
        _examples_to_see(recipe, 1)
    except HfDmsError as error:
        raise HfDmsError(f"compare.strategies.{cell.strategy}, target {cell.target:g}: {error}") from error


# ---- one cell --------------------------------------------------------------------------------------------------------
def run_cell(setup: Setup, cell: Cell) -> dict[str, Any]:
    """Choose, cut, repair and recover, and measure after each step.

    Returns:
        `scores`: per stage (dense, cut, repaired, recovered) and text the metric, its standard error and the scores of
        the single examples. `seen`: examples that each stage saw, and for a language model `tokens`, those of all
        stages. `seconds` per stage. `resource`: share kept of the dense model's. `sizes`. `peak_bytes`: peak resident
        memory, and on an accelerator `peak_device_bytes`, the peak that torch allocated there.
    """
    recipe = recipe_of(setup.prepared.recipe, cell)
    _reset_peaks(_device(setup))
    examples = shuffled(setup.prepared.examples, cell.seed)
    dense = _dense(setup)
    row: dict[str, Any] = {"scores": {}, "seen": {}, "seconds": {}}

    def finish_(stage: str, model: PreTrainedModel, started: float, seen: int) -> None:
        row["seconds"][stage], row["seen"][stage] = round(time.time() - started, 1), seen
        row["scores"][stage] = _measured(model, setup)

    if not setup.dense_scores:
        setup.dense_scores.update(_measured(dense, setup))
    row["scores"]["dense"] = setup.dense_scores
    set_seed(cell.seed)  # after the work that only the first cell does, so that all cells have the same random state
    started = time.time()
    pruned, plan, resource, seen = _choose(dense, recipe, examples, cell)
    row |= {"resource": resource, "sizes": plan.sizes}
    finish_("cut", pruned, started, seen)
    if choice_changes_weights(recipe):
        dense = _dense(setup)  # load it again: the choice has changed its weights, so it is no target for repair
    if (repair := recipe.recover.repair) is not None:
        started = time.time()
        batches = Batches(examples, repair.examples, recipe.eval.batch_size)
        keep = functools.partial(row.__setitem__, "kept_of_repair") if repair.interpolate else False
        repair_(
            pruned,
            dense,
            plan,
            batches,
            ridge=repair.ridge,
            progress=Countdown("repair", "layers"),
            epochs=repair.epochs,
            interpolate=keep,
        )
        finish_("repaired", pruned, started, min(repair.examples, len(examples.train)))
    if recipe.recover.train is not None:
        started = time.time()
        arguments = training_arguments(recipe, "recover", setup.folder / _name(cell))
        # A cell is made in one go; a stopped one is made again.
        arguments.save_strategy = "no"
        distillation, lora = recipe.recover.distillation, lora_config(recipe, "recover.lora")
        teacher, float32 = dense if distillation else None, recipe.recover.float32
        if recipe.recovers_afresh:
            fresh_weights_(pruned, arguments.seed)
        train_(pruned, arguments, examples, teacher, distillation, lora=lora, float32=float32)
        finish_("recovered", pruned, started, examples_of(arguments, examples))
    if recipe.task.generates:
        row["tokens"] = sum(row["seen"].values()) * recipe.data.sequence_length
    row["peak_bytes"] = peak_resident_bytes()
    if _device(setup).type != "cpu":
        row["peak_device_bytes"] = torch.accelerator.max_memory_allocated(_device(setup))
    return row


def _choose(
    model: PreTrainedModel, recipe: Recipe, examples: Examples, cell: Cell
) -> tuple[PreTrainedModel, Plan, float, int]:
    """The cut model of a strategy, its plan, the share of the resource that it keeps, and the examples that it saw."""
    arguments = training_arguments(recipe, "train", Path(recipe.output.path, "search"))
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    count = _examples_to_see(recipe, examples_of(arguments, examples))
    if "criterion" not in cell.settings:
        arguments.max_steps = max(count // batch, 1)
        trainer = DMSTrainer(
            model=model, args=arguments, dms_config=recipe.dms, train_dataset=examples.train,
            data_collator=examples.collate,
        )  # fmt: skip
        # A search over refitted weights sees examples beside its steps. They count, so it gets fewer steps.
        beside = examples_beside_the_steps(trainer)
        if recipe.compare.tokens is not None:
            arguments.max_steps = max((count - beside) // batch, 1)
        trainer.train()
        searched: Any = trainer.model
        seen, pruned = arguments.max_steps * batch + beside, trainer.prune()
    else:
        searched, name = model, cell.settings["criterion"]
        pruned, seen = cut_by_criterion(model, recipe, name, examples, count, arguments.train_batch_size)
    plan, gates = plan_of(searched), gates_of(searched)
    sizes = {name: torch.tensor(units) for name, units in plan.sizes.items()}
    resource = float(gates.resource(gates.dense_sizes() | sizes))
    # The plan and the share are read from the gates before they go.
    detach_(searched)
    return pruned, plan, resource, seen


def _dense(setup: Setup) -> PreTrainedModel:
    """The dense model of all cells: loaded, and fine-tuned once if the recipe asks for it, with the recipe's seed."""
    model = dense_model(setup.prepared).eval()
    model.to(_device(setup))
    return model


def _device(setup: Setup) -> torch.device:
    """The device of the search; one-shot strategies use the same."""
    return setup.prepared.arguments["search"].device


def _examples_to_see(recipe: Recipe, asked: int) -> int:
    """Examples that a strategy may see: as many as the search, or what `compare.tokens` leaves after the repair."""
    tokens, repair = recipe.compare.tokens, recipe.recover.repair
    if tokens is None:
        return asked
    left = tokens // recipe.data.sequence_length - (repair.examples if repair is not None else 0)
    if left < 1:
        raise HfDmsError(
            f"compare.tokens = {tokens} is less than the repair needs ({repair.examples if repair else 0} sequences of "
            f"{recipe.data.sequence_length} tokens). Raise it, or lower recover.repair.examples."
        )
    return left


def _measured(model: PreTrainedModel, setup: Setup) -> dict[str, Any]:
    """Metric, standard error and scores of the single examples, per text."""
    recipe, collate, found = setup.prepared.recipe, setup.prepared.examples.collate, {}
    for name, rows in setup.texts.items():
        scores = example_scores(model.eval(), recipe.task, rows, collate, recipe.eval.batch_size)
        found[name] = summary(recipe.task, scores) | {"scores": [round(value, 6) for value in scores.tolist()]}
    return found


def _name(cell: Cell) -> str:
    return f"{cell.strategy}-{cell.target:g}-{cell.seed}"


def _reset_peaks(device: torch.device) -> None:
    """Reset the peaks of memory in use: of a device, and of this process (only on Linux, see `man proc`).

    What the cells before have left is given back first, so that a peak does not depend on them.
    """
    give_back_freed_memory_()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    file = Path("/proc/self/clear_refs")
    if os.access(file, os.W_OK):
        # 5 resets the peak of resident memory (VmHWM).
        file.write_text("5", encoding="ascii")
