"""One command: search, cut, verify, retrain if asked, save, measure. What `hf-dms prune RECIPE` runs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import check_writable, save_pruned
from .data import as_dataset, load_sequences
from .evaluate import evenly_spaced, perplexity, tokens_per_second
from .masking import detach_
from .recipe import Recipe, check_recipe, load_model_config, training_arguments
from .report import model_card, sizes_and_costs, table, versions
from .trainer import DMSTrainer, SearchProgress

REPORT = "dms_report.json"


def run(recipe: Recipe) -> dict[str, Any] | None:
    """Run a recipe to its end, or from where an earlier run of it stopped.

    Args:
        recipe: what to do.

    Returns:
        The content of `dms_report.json`; None if the result was there already.

    Raises:
        ValueError: something is wrong with the recipe; nothing has been written.
    """
    output = Path(recipe.output.path)
    unfinished = output.with_name(output.name + ".unfinished")
    if (output / REPORT).is_file() and not recipe.output.overwrite:
        return None
    check_writable(output, recipe.output.overwrite)
    check_recipe(recipe)
    _claim(unfinished, recipe)
    started = time.time()
    arguments = training_arguments(recipe, "train", unfinished / "search")
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    sequences, held_out = load_sequences(recipe.data, tokenizer)
    held_out = evenly_spaced(held_out, recipe.eval.sequences)
    model = load_dense(recipe)
    model.to(arguments.device)
    report: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": arguments.seed, "versions": versions()}
    report["protocol"] = f"{len(held_out)} held-out sequences of {held_out.shape[1]} tokens, each scored by itself"
    print(f"Measuring the dense model on {report['protocol']} ...", flush=True)
    dense_perplexity = perplexity(model.eval(), held_out, recipe.eval.batch_size)

    trainer = DMSTrainer(model=model, args=arguments, dms_config=recipe.dms, train_dataset=as_dataset(sequences))
    trainer.train(resume_from_checkpoint=_last_checkpoint(unfinished / "search"))
    pruned = trainer.prune()
    report |= sizes_and_costs(model, recipe.data.sequence_length)
    report["search"] = [logs for logs in trainer.state.log_history if "task_loss" in logs]
    gap = {"soft": _soft_masked_perplexity(model, held_out, recipe.eval.batch_size)}
    detach_(model)
    report["dense"]["perplexity"] = dense_perplexity
    report["pruned"]["perplexity"] = gap["hard"] = perplexity(pruned, held_out, recipe.eval.batch_size)
    report["masks"] = gap
    if recipe.recover is not None:
        _retrain(pruned, recipe, unfinished / "recover", sequences)
        report["recovered"] = {"perplexity": perplexity(pruned, held_out, recipe.eval.batch_size)}
    speeds = tokens_per_second([model, pruned], held_out[: recipe.eval.batch_size])
    report["dense"]["tokens_per_second"], report["pruned"]["tokens_per_second"] = speeds
    report["sample"] = continuation(pruned, tokenizer, recipe)
    report["model_class"] = type(pruned).__name__
    report["seconds"] = round(time.time() - started)
    save_pruned(
        pruned,
        output,
        processor=tokenizer,
        inputs={"input_ids": held_out[:1]},
        files={
            REPORT: json.dumps(report, indent=2) + "\n",
            "README.md": model_card(report, recipe.model.path, output.name),
        },
        overwrite=recipe.output.overwrite,
    )
    shutil.rmtree(unfinished)
    print("\n" + table(report))
    return report


def load_dense(recipe: Recipe) -> PreTrainedModel:
    """The dense model of a recipe: pretrained, or randomly initialised for pipeline np."""
    dtype = recipe.model.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    if recipe.dms.pipeline == "np":
        config = load_model_config(recipe)
        dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        options = {"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        revision=recipe.model.revision,
        dtype=dtype,
        attn_implementation=recipe.model.attn_implementation,
    )


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
    """What the pruned model makes of the recipe's prompt (greedy), prompt included; empty without a prompt."""
    if not recipe.eval.prompt:
        return ""
    inputs = tokenizer(recipe.eval.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=recipe.eval.new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _retrain(pruned: PreTrainedModel, recipe: Recipe, folder: Path, sequences: Tensor) -> None:
    """Train the pruned model, in place: an ordinary Trainer run."""
    arguments = training_arguments(recipe, "recover", folder)
    use_cache = pruned.config.use_cache
    trainer = Trainer(model=pruned, args=arguments, train_dataset=as_dataset(sequences))
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SearchProgress())
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    pruned.config.use_cache = use_cache
    pruned.eval()


def _soft_masked_perplexity(model: PreTrainedModel, held_out: Tensor, batch_size: int) -> float:
    """Perplexity on the soft masks that the search ended with; what hard masks differ by is the cost of rounding."""
    model.eval()
    model.dms_gates.train()
    try:
        return perplexity(model, held_out, batch_size)
    finally:
        model.dms_gates.eval()


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


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
