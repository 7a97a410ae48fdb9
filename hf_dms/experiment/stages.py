"""The stages of an experiment: dense model, search and cut, repair, training after the cut; and how each is scored."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..archs.plain_view import with_adapters, with_adapters_of
from ..config import SEARCH
from ..cut.plan import Plan
from ..cut.plans import Plans
from ..cut.prune import plan_of, prune
from ..gating.attach import copy_search_, gates_of
from ..gating.outcome import SearchOutcome, search_outcome
from ..gating.supernet import fresh_weights_
from ..measure.speed import seconds_per_batch
from ..measure.versions import versions
from ..refit.repair import repair_
from ..report.numbers import network_of, sizes_and_costs
from ..report.report import Report
from ..strategies.one_shot import criterion_of
from ..tasks.evaluate import evenly_spaced, example_scores, summary
from ..training.distributed import print_on_main, run_on_main, unshard_
from ..training.exact_resume import train_or_resume_
from ..training.finetune import train_
from ..training.progress import Countdown
from ..training.trainer import DMSTrainer
from .checks import check_trained, check_weights
from .choose import cut_by_criterion, examples_of, shuffled
from .objects import empty_model, model_class, packing
from .prepare import Prepared
from .recipe import Recipe
from .sections import REPAIR_BATCH


def dense_model(prepared: Prepared) -> PreTrainedModel:
    """The dense model of a recipe: loaded (or randomly initialised for pipeline np), and fine-tuned if asked.

    An interrupted fine-tuning resumes from its last checkpoint. A finished one is only loaded.

    Raises:
        ValueError: weights of the model are missing in the checkpoint, and the recipe does not train them.
    """
    model = load_model(prepared)
    if prepared.recipe.finetune:
        print_on_main(f"Fine-tuning the {network_of(prepared.recipe.to_dict())} ...")
        limit = prepared.recipe.dms.max_nonfinite_steps
        arguments = _arguments(prepared, "finetune")
        train_(model, arguments, prepared.examples, stage="fine-tuning", max_nonfinite_steps=limit, keep=True)
    return model


@dataclass(frozen=True)
class Searched:
    """The result of a search.

    Attributes:
        model: the dense model with the gates of the search, and with its adapters if the recipe has a lora section.
        pruned: the cut model.
        plan: which units of the dense model it keeps.
        costs: exact sizes and costs of both, see `sizes_and_costs`.
        outcome: the shares that were learned and that the cut keeps.
        logs: the course of the search.
        plans: plans at the larger sizes that the search passed.
    """

    model: Any
    pruned: PreTrainedModel
    plan: Plan
    costs: dict[str, Any]
    outcome: SearchOutcome
    logs: list[Any]
    plans: Plans = dataclasses.field(default_factory=dict)


def search_and_cut(dense: PreTrainedModel, prepared: Prepared) -> Searched:
    """Search and cut, or, with another `dms.strategy`, choose without a search and cut."""
    if prepared.recipe.dms.strategy != SEARCH:
        return _choose(dense, prepared)
    recipe, examples, arguments = prepared.recipe, prepared.examples, _arguments(prepared, "search")
    lora = prepared.lora["lora"]
    model: Any = dense
    if recipe.model.quantization is not None:
        packed = {"quantization_config": packing(recipe, dense.dtype), "device_map": {"": arguments.device}}
        # Two copies of the weights exist from here on, a packed one that searches and a whole one for the cut. Only the
        # first has to be on the device.
        dense.cpu()
        model = load_model(prepared, **packed)
    model = model if lora is None else with_adapters(model, lora, arguments.seed)
    print_on_main("Searching ...")
    trainer = DMSTrainer(
        model=model,
        args=arguments,
        dms_config=recipe.dms,
        train_dataset=examples.train,
        eval_dataset=prepared.held_out,
        data_collator=examples.collate,
    )
    train_or_resume_(trainer, keep=True)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # measure in the model's own precision
    if recipe.model.quantization is not None:
        whole = dense.to(arguments.device) if lora is None else with_adapters_of(model, dense.to(arguments.device))
        copy_search_(model, whole)
        model, pruned = whole, prune(whole, inputs=trainer.example_inputs())
    else:
        pruned = trainer.prune()
    unshard_(model, arguments.device)
    # Evaluations are in the history too, under other keys.
    logs = [logs for logs in trainer.state.log_history if "task_loss" in logs]
    return dataclasses.replace(_ended_in(model, pruned, logs), plans=trainer.kept_plans.plans)


def _choose(dense: PreTrainedModel, prepared: Prepared) -> Searched:
    """In place of a search: a one-shot strategy sees the search's data once, and the model is cut."""
    recipe, arguments, name = prepared.recipe, _arguments(prepared, "search"), prepared.recipe.dms.strategy
    print_on_main(f"Choosing structure by {name} ...")
    dense.to(arguments.device)
    # Strategies read the first examples, which in a file are often of one kind. A search's loader shuffles too.
    examples = shuffled(prepared.examples, arguments.seed)
    count = examples_of(arguments, examples)
    pruned, seen = cut_by_criterion(dense, recipe, name, examples, count, arguments.train_batch_size)
    print_on_main(f"{name} has seen {seen} examples.")
    return _ended_in(dense, pruned, [])


def _ended_in(model: Any, pruned: PreTrainedModel, logs: list[Any]) -> Searched:
    plan = plan_of(model)
    costs = sizes_and_costs(model, plan, gates_of(model).attachment.config.sequence_length)
    return Searched(model, pruned, plan, costs, search_outcome(model), logs)


def recover_steps(pruned: PreTrainedModel, searched: PreTrainedModel, plan: Plan, prepared: Prepared) -> Iterator[str]:
    """Repair and train the pruned model, in place, as the recipe asks.

    Args:
        pruned: the cut model.
        searched: the model of the search, without gates and adapters.
        plan: which of its units the cut model keeps.
        prepared: the recipe and its data.

    Yields:
        The name of the state after each step: repaired, recovered.
    """
    recipe, examples = prepared.recipe, prepared.examples
    repair, distillation = recipe.recover.repair, recipe.recover.distillation
    dense: Any = searched  # still the dense model, if its weights did not train
    if choice_changes_weights(recipe) and recipe.lora is None and (repair or distillation):
        dense = dense_model(prepared).eval()
        dense.to(pruned.device)
    if repair is not None:
        print_on_main("Repairing the pruned model ...")
        rows = evenly_spaced(examples.train, repair.examples)
        loader = DataLoader(rows, REPAIR_BATCH, collate_fn=examples.collate)
        batches = [send_to_device(batch, pruned.device) for batch in loader]
        repair_(
            pruned,
            dense,
            plan,
            batches,
            ridge=repair.ridge,
            progress=Countdown("repair", "layers"),
            epochs=repair.epochs,
            interpolate=_print_share if repair.interpolate else False,
        )
        yield "repaired"
    if recipe.recover.train is not None:
        arguments = _arguments(prepared, "recover")
        afresh = " from fresh weights" if recipe.recovers_afresh else ""
        print_on_main(f"Recovering the pruned model{afresh} ...")
        if recipe.recovers_afresh:
            fresh_weights_(pruned, arguments.seed)
        train_(
            pruned,
            arguments,
            prepared.recover_examples,
            dense if distillation else None,
            distillation,
            lora=prepared.lora["recover.lora"],
            float32=recipe.recover.float32,
            stage="recover",
            max_nonfinite_steps=recipe.dms.max_nonfinite_steps,
            keep=True,
        )
        yield "recovered"


def _print_share(share: float) -> None:
    print_on_main(f"{share:.0%} of the repair's change was kept, which gives the lowest loss.")


def choice_changes_weights(recipe: Recipe) -> bool:
    """Whether the search, or the strategy in its place, changes the dense model's weights."""
    if recipe.dms.strategy == SEARCH:
        return recipe.dms.pipeline != "p-"
    return criterion_of(recipe.dms.strategy).changes_weights


def summaries(recipe: Recipe, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """The metric of each model, and its difference from the dense model's."""
    dense = scores["dense"]
    return {name: summary(recipe.task, each, None if name == "dense" else dense) for name, each in scores.items()}


def report_of(
    prepared: Prepared,
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    costs: Mapping[str, Any],
    scores: Mapping[str | None, Mapping[str, Tensor]],
    **more: Any,
) -> Report:
    """The report of a result, without its time.

    Args:
        prepared: the recipe.
        dense, pruned: both models; their speed is measured here.
        costs: sizes and costs of both, see `sizes_and_costs`.
        scores: scores by text (None is the held-out data) and model.
        more: further fields of the report.
    """
    recipe, numbers = prepared.recipe, dict(costs)
    speed = run_on_main(lambda: speeds(dense, pruned, prepared))
    for name, quality in summaries(recipe, scores[None]).items():
        numbers[name] = numbers.get(name, {}) | quality | speed.get(name, {})
    return Report(
        **numbers,
        **more,
        texts={text: summaries(recipe, each) for text, each in scores.items() if text is not None} or None,
        protocol=protocol_of(prepared),
        original=prepared.original,
        layout=recipe.dms.layout,
        model_class=type(pruned).__name__,
        recipe=recipe.to_dict(),
        seed=prepared.arguments["search"].seed,
        versions=versions(),
        seconds=0,
    )


def protocol_of(prepared: Prepared) -> str:
    """The data that quality is measured on, in words."""
    return f"{len(prepared.held_out)} held-out {prepared.examples.unit}"


# ---- measuring -------------------------------------------------------------------------------------------------------
def score(model: PreTrainedModel, prepared: Prepared, text: str | None = None) -> Tensor:
    """Scores of the held-out examples, or of a further text, in the metric of the recipe's task, `[examples]`."""
    recipe, collate = prepared.recipe, prepared.examples.collate
    rows = prepared.held_out if text is None else prepared.texts[text]
    progress = Countdown("measuring", "batches")
    return example_scores(model, recipe.task, rows, collate, recipe.eval.batch_size, progress)


def scores_on_soft_masks(model: PreTrainedModel, measure: Any) -> Tensor:
    """Scores on the soft masks at the end of the search. The difference from hard masks is the cost of rounding."""
    model.eval()
    with gates_of(model).soft_masks():
        return measure(model)


def speeds(model: PreTrainedModel, pruned: PreTrainedModel, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Speeds of both models for the report: tokens, texts or images per second, for one batch."""
    task, examples = prepared.recipe.task, prepared.examples
    count = min(prepared.recipe.eval.batch_size, len(examples.held_out))
    batch = examples.collate([examples.held_out[i] for i in range(count)])
    amount = task.amount(batch)
    key, _ = task.speed
    seconds = seconds_per_batch([model, pruned], batch)
    return {name: {key: amount / each} for name, each in zip(("dense", "pruned"), seconds)}


def _arguments(prepared: Prepared, stage: str) -> Any:
    """The `TrainingArguments` of the next stage. accelerate's global state still has the previous stage's precision."""
    AcceleratorState._reset_state()
    return prepared.arguments[stage]


def load_model(prepared: Prepared, **packed: Any) -> PreTrainedModel:
    """The model at `model.path`, or for pipeline np a model with random weights.

    Args:
        prepared: the recipe.
        packed: arguments of `from_pretrained` that pack its weights.

    Raises:
        ValueError: a weight file is damaged or missing, or weights are missing in it that the recipe does not train.
    """
    # A copy: the model keeps the config, a Trainer changes `use_cache` in it, and stages load the model again.
    recipe, config = prepared.recipe, copy.deepcopy(prepared.config)
    dtype = recipe.model.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    if recipe.dms.pipeline == "np":
        dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        options = {"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}
        return model_class(recipe).from_config(config, dtype=dtype, **options)
    # Before transformers loads the model: it gives missing weights random values, and only warns.
    check_weights(recipe, empty_model(recipe, config), download=True)
    model, loading = model_class(recipe).from_pretrained(
        recipe.model.path,
        config=config,
        revision=recipe.model.revision,
        dtype=dtype,
        attn_implementation=recipe.model.attn_implementation,
        output_loading_info=True,
        **packed,
    )
    check_trained(recipe, loading["missing_keys"])
    return model
