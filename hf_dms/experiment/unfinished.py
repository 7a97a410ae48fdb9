"""The working folder of an unfinished run, `OUTPUT.unfinished`: which of its stages a recipe may continue.

It holds a folder of checkpoints for each stage, and the recipe that made them. A stage is repeated only if a value that
influences it has changed. The folder is removed when a run ends.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from ..checkpoint.folders import replace_folder
from ..errors import HfDmsError
from ..report.numbers import REPORT, without_local_paths
from ..training.distributed import print_on_main
from .recipe import LENGTHS, Recipe

CLAIM = "recipe.json"
STAGES = {"finetune": "fine-tuned model", "search": "search", "recover": "training after the cut"}  # by folder
IDLE = (  # prefixes of keys of TrainingArguments that do not influence weights or ratios
    "logging_", "save_", "log_", "report_to", "run_name", "disable_tqdm", "dataloader_num_workers",
    "dataloader_prefetch", "dataloader_pin", "dataloader_persistent",
)  # fmt: skip


def is_finished(recipe: Recipe, output: Path, unfinished: Path) -> bool:
    """Whether the result exists already. If a run was killed right after writing it, its working folder is removed.

    Raises:
        HfDmsError: it is the result of another recipe.
    """
    if not (output / REPORT).is_file() or recipe.output.overwrite:
        return False
    if changed := _changed_since(output / REPORT, recipe):
        raise HfDmsError(
            f"{output} holds the finished result of another recipe: {changed}. Choose another output.path, or set "
            "output.overwrite: true."
        )
    # Killed between the writing of the result and the removal of its folder. Another recipe's folder is not touched.
    if not unfinished.exists() or _read_claim(unfinished) == _plain(recipe):
        remove_unfinished(unfinished, output)
    return True


def _changed_since(report: Path, recipe: Recipe) -> str:
    """The keys of model, data, training and search whose values a finished result was not made with, in words.

    A report has the recipe as it ran, with names in place of paths. So a value that a run fills in or changes is not
    compared.
    """
    now = influences(_plain(recipe), "search")
    try:
        before = influences(json.loads(report.read_text(encoding="utf-8"))["recipe"], "search")
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""  # of another version, or changed by hand
    is_share = isinstance(recipe.dms.target, float | int) and recipe.model.supernet is None
    filled_in = {"bf16"} | (set() if is_share else {"target", "prune", "protect"})
    found = []
    for section in before.keys() & now.keys():
        old, new = before[section] or {}, now[section] or {}
        for key in sorted((old | new).keys() - filled_in):
            was, now_is = old.get(key), new.get(key)
            # Only free sections can lack a key; elsewhere another version wrote the report.
            is_free = section in ("train", "finetune", "lora")
            if not _same(was, now_is, key) and (is_free or not (was is None or now_is is None)):
                names = ["left out" if value is None else value for value in (was, now_is)]
                found.append(f"{section}.{key} was {names[0]}, is {names[1]}")
    return ", ".join(sorted(found))


def _same(was: Any, now: Any, key: str) -> bool:
    """Whether a value of a report is that of a recipe, whose local paths the report shortens to `.../name`."""
    if isinstance(was, str) and was.startswith(".../") and isinstance(now, str):
        return Path(was).name == Path(now).name  # also if nothing is there any more
    return was in (now, without_local_paths(now, key))


def remove_unfinished(unfinished: Path, output: Path) -> None:
    """Remove the working folder of a finished run. Logs of TensorBoard move into the result."""
    for logs in unfinished.glob("*/runs"):
        shutil.copytree(logs, output / "runs" / logs.parent.name, dirs_exist_ok=True)
    replace_folder(unfinished)


def claim(unfinished: Path, recipe: Recipe) -> None:
    """Take over the working folder for a recipe, with those of its stages that this recipe would make in the same way.

    Raises:
        HfDmsError: the folder holds a search, or a fine-tuning before it, that this recipe would make differently.
    """
    now, before = _plain(recipe), _read_claim(unfinished)
    for stage in STAGES if before is not None else ():
        folder = unfinished / stage
        try:
            changed = _changes(influences(before, stage), influences(now, stage))
        except (LookupError, TypeError, AttributeError):
            raise HfDmsError(
                f"{unfinished / CLAIM} is not a recipe that this version of hf_dms wrote, so it is unknown what made "
                f"the folder. Choose another output.path, or delete {unfinished}."
            ) from None
        # Without a checkpoint there is nothing to lose.
        if changed and sort_checkpoints(str(folder)):
            if stage != "recover":
                raise HfDmsError(
                    f"{folder} holds the {STAGES[stage]} of another recipe: {changed}. Change it back to continue that "
                    f"run, or choose another output.path, or delete {unfinished if stage == 'finetune' else folder} to "
                    "do it again."
                )
            print_on_main(f"The training after the cut begins again: {changed}.")
        if changed:
            replace_folder(folder)
    unfinished.mkdir(parents=True, exist_ok=True)
    written = unfinished / f"{CLAIM}.tmp"
    written.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # In one step, so that a kill leaves the old file or the new one, never a part of it.
    os.replace(written, unfinished / CLAIM)


def influences(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    """The part of a recipe that the result of a stage depends on, by section, including the stages before it.

    Args:
        recipe: the recipe as plain values.
        stage: finetune, search or recover.
    """
    model, dms, train = recipe["model"], recipe["dms"], recipe["train"]
    found: dict[str, Any] = {
        "model": {key: model[key] for key in ("path", "revision", "task", "dtype", "attn_implementation", "supernet")},
        "data": recipe["data"],
        "finetune": _lasting(recipe["finetune"]),
        "train": {key: value for key, value in _lasting(train).items() if key not in LENGTHS},
        # The fine-tuning before a search depends on the pipeline only in that np begins with random weights.
        "dms": {"pipeline": "np" if dms["pipeline"] == "np" else "p or p-"},
    }
    if model["supernet"] is not None:  # these decide which of its dims are larger
        found["dms"] |= {"prune": dms["prune"], "protect": dms["protect"]}
    if stage == "finetune":
        return found
    found["model"]["quantization"] = model["quantization"]
    found["train"] = _lasting(train)
    # `max_nonfinite_steps` decides when a search gives up, not where it goes.
    found["dms"] = {key: value for key, value in dms.items() if key != "max_nonfinite_steps"}
    found["lora"] = recipe["lora"]
    # Evaluations can choose the best checkpoint, and so the number of examples matters.
    if train.get("eval_strategy") not in (None, "no", False):
        found["eval"] = {"examples": recipe["eval"]["examples"]}
    if stage == "recover":
        recover = dict(recipe["recover"])
        found["recover"] = _lasting(recover.pop("train") or {}) | recover
    return found


def _lasting(given: dict[str, Any]) -> dict[str, Any]:
    """Keys of `TrainingArguments` that influence the result. If the best checkpoint is kept, the saving keys do too."""
    if given.get("load_best_model_at_end"):
        return given
    return {key: value for key, value in given.items() if not key.startswith(IDLE)}


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values of JSON."""
    # Through JSON, so that tuples and numbers compare equal to what was read from the file.
    return json.loads(json.dumps(recipe.to_dict()))


def _read_claim(unfinished: Path) -> Any:
    """The recipe in the folder; None if there is no file, and a text (which is no recipe) if it cannot be read."""
    file = unfinished / CLAIM
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        return file.name


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys that differ, in words; empty if none differs."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key, 'left out')}, is {new.get(key, 'left out')}" for key in keys)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key, without those that are None."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return {key: value for key, value in found.items() if value is not None}
