"""`output.sizes`: larger sizes that a search passed. Each is cut, recovered, measured and saved too."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..cut.plan import PLAN_FILE, Plan, plan_to_json
from ..cut.plans import Plans
from ..cut.prune import cut_to
from ..errors import HfDmsError
from ..gating.attach import attach_, detach_, gates_of
from ..report.numbers import sizes_and_costs
from ..report.report import Report
from ..training.distributed import print_on_main, run_on_main
from .objects import training_arguments
from .prepare import Prepared, unfinished_folder
from .recipe import Recipe
from .sections import HubConfig
from .stages import recover_steps, report_of

Scores = Mapping[str | None, Mapping[str, Tensor]]  # by text, None is the held-out data, and model
Measured = Callable[[str, PreTrainedModel, str | None], Tensor]


def folder_of(recipe: Recipe, size: float) -> Path:
    """The folder of a size of `output.sizes`."""
    output = Path(recipe.output.path)
    return output.with_name(f"{output.name}-{size:g}")


def save_sizes(
    dense: PreTrainedModel,
    prepared: Prepared,
    plans: Plans,
    scores: Scores,
    measured: Measured,
    save: Callable[..., Any],
) -> None:
    """Make and save every size that the recipe asks for. Sizes that an interrupted run has saved are not made again.

    Args:
        dense: the dense model without gates.
        prepared: the recipe.
        plans: the plans that the search passed.
        scores: scores of the dense model, by text.
        measured: function that measures a model, with its name in messages and the name of a text.
        save: function that writes a folder, from a model, the prepared recipe, the report and the files of the plan.

    Raises:
        HfDmsError: the search resumed from a checkpoint without these plans.
    """
    recipe = prepared.recipe
    for size in recipe.output.sizes:
        work = unfinished_folder(recipe) / "recover" / f"at-{size:g}"
        if (work / "saved").exists():
            continue
        plan = next((plan for level, plan in plans.items() if abs(level - size) < 1e-6), None)
        if plan is None:
            raise HfDmsError(f"output.sizes: the search has no plan at {size:g}. Delete {unfinished_folder(recipe)}.")
        output = dataclasses.replace(recipe.output, path=str(folder_of(recipe, size)), sizes=[])
        arguments = dict(prepared.arguments)
        if recipe.recover.train is not None:
            arguments["recover"] = training_arguments(recipe, "recover", work)
        own = dataclasses.replace(
            recipe, output=output, hub=HubConfig(), dms=dataclasses.replace(recipe.dms, target=size)
        )
        here = dataclasses.replace(prepared, recipe=own, arguments=arguments)
        print_on_main(f"Cutting at {size:g} ...")
        pruned, report, files = _made(dense, here, plan, scores, measured)
        print_on_main(f"Saving to {output.path} ...")
        run_on_main(functools.partial(save, pruned, here, report, files))
        # A mark of this run's own: with output.overwrite, a folder may be there from an older one.
        work.mkdir(parents=True, exist_ok=True)
        (work / "saved").touch()


def _made(
    dense: PreTrainedModel, prepared: Prepared, plan: Plan, scores: Scores, measured: Measured
) -> tuple[PreTrainedModel, Report, dict[str, str]]:
    """The model of a plan, its report, and the file of the plan."""
    recipe, started = prepared.recipe, time.time()
    # For the counts and the cut alone; repair and distillation need the dense model without gates.
    attach_(dense, recipe.dms)
    try:
        bound, length = gates_of(dense).attachment.bound, gates_of(dense).attachment.config.sequence_length
        pruned, numbers = cut_to(dense, plan), sizes_and_costs(dense, plan, length)
    finally:
        detach_(dense)
    found = {text: {"dense": each["dense"]} for text, each in scores.items()}
    for step in itertools.chain(["pruned"], recover_steps(pruned, dense, plan, prepared)):
        for text, each in found.items():
            each[step] = measured(step, pruned, text)
    report = report_of(prepared, dense, pruned, numbers, found)
    report = dataclasses.replace(report, seconds=round(time.time() - started))
    return pruned, report, {PLAN_FILE: plan_to_json(plan, bound, recipe.dms.layout)}
