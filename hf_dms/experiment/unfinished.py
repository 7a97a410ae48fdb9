"""The working folder of an unfinished run, `OUTPUT.unfinished`: which of its stages a recipe may continue.

It holds a folder of checkpoints for each stage, and the recipe that made them, with hashes of its data files. A stage
is repeated only if a value or a file that influences it has changed. The folder is removed when a run ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj
from transformers.trainer_utils import sort_checkpoints

from ..checkpoint.folders import replace_folder
from ..errors import HfDmsError
from ..report.numbers import REPORT, without_local_paths
from ..training.distributed import print_on_main
from .recipe import LENGTHS, Recipe

CLAIM = "recipe.json"
FILES = "files"  # key of the hashes of data files, beside the sections of the recipe in that file
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
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
        before = report.get("recipe")
    except (ValueError, AttributeError):
        report, before = {}, {}  # changed by hand
    if "proof" in report and before is None:
        raise HfDmsError(
            f"{output} was cut by a plan (hf-dms prune --plan), not by this recipe. Choose another output.path, or set "
            "output.overwrite: true."
        )
    if changed := _changed_since(before, recipe):
        raise HfDmsError(
            f"{output} holds the finished result of another recipe: {changed}. Choose another output.path, or set "
            "output.overwrite: true."
        )
    if measured := _differences(before, _plain(recipe), "eval"):
        print_on_main(f"{measured}: a finished result is not measured again. `hf-dms eval` measures it.")
    # Killed between the writing of the result and the removal of its folder. Another recipe's folder is not touched.
    claimed = _read_claim(unfinished)
    if isinstance(claimed, dict):
        claimed.pop(FILES, None)
    if not unfinished.exists() or claimed == _plain(recipe):
        remove_unfinished(unfinished, output)
    return True


def _changed_since(report: Any, recipe: Recipe) -> str:
    """The keys of model, data, search and the stages after it whose values a finished result was not made with.

    Args:
        report: the recipe in the report. It is the recipe as it ran, with names in place of paths. So a value that a
            run fills in or changes is not compared.
        recipe: the recipe that is asked for now.

    Returns:
        The keys and both values, in words.
    """
    now = influences(_plain(recipe), "search")
    try:
        before = influences(report, "search")
    except (LookupError, TypeError, AttributeError):
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
    after = _differences(report, _plain(recipe), "recover")
    return ", ".join([*sorted(found), *([after] if after else [])])


def _differences(report: dict[str, Any], now: dict[str, Any], section: str) -> str:
    """The keys of `recover` or `eval` whose values differ from those in a report, in words.

    Where rules give the training after the cut its values (recover.py), only values that are asked for are compared.
    """
    try:
        was, asked = (_values_of(without_local_paths(each[section], section)) for each in (report, now))
    except (LookupError, TypeError, AttributeError):
        return ""
    by_rule, train = False, now[section].get("train")
    if train is not None:
        if report[section].get("train") is None:
            return "recover was without a training"
        by_rule = not any(key in train for key in LENGTHS)
    keys = [key for key, value in asked.items() if value is not False] if by_rule else was | asked
    differ = [key for key in sorted(keys) if key != "bf16" and not _same(was.get(key), asked.get(key), key)]
    names = {key: [values.get(key, "left out") for values in (was, asked)] for key in differ}
    return ", ".join(f"{section}.{key} was {before}, is {wanted}" for key, (before, wanted) in names.items())


def _values_of(section: dict[str, Any]) -> dict[str, Any]:
    """The values of `recover` or `eval` by dotted key, without those that influence no result."""
    values = dict(section)
    return _flat(_lasting(values.pop("train", None) or {}) | values)


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
    now[FILES] = _hashes(now)
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
        FILES: _hashes_of(recipe, recipe["data"]),
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
        if recover["data"] is not None:
            found[FILES] |= _hashes_of(recipe, recover["data"])
    return found


def _hashes(recipe: dict[str, Any]) -> dict[str, str]:
    """A hash of each file and folder of data, by path, which shows whether it has changed. Hub datasets have none.

    A file's content is hashed. For a folder, which may hold millions of files, their names and sizes are hashed.
    """
    sections, found = [recipe["data"], recipe["recover"]["data"]], {}
    for path in {path for data in sections if data is not None for path in _paths_of(data)}:
        if Path(path).is_file():
            with open(path, "rb") as file:
                found[path] = sha_fileobj(file).hex()
        elif Path(path).is_dir():
            inside = sorted(inner for inner in Path(path).rglob("*") if inner.is_file())
            sizes = "".join(f"{inner.relative_to(path)} {inner.stat().st_size}\n" for inner in inside)
            found[path] = hashlib.sha256(sizes.encode()).hexdigest()
    return found


def _hashes_of(recipe: dict[str, Any], data: dict[str, Any]) -> dict[str, str]:
    """Those of the hashes beside a plain recipe that belong to a data section."""
    hashes = recipe.get(FILES, {})
    return {path: hashes[path] for path in _paths_of(data) if path in hashes}


def _paths_of(data: dict[str, Any]) -> list[str]:
    """What a data section names: files, folders and Hub ids. A share that is held out is among them, and is no file."""
    return [data["path"], str(data["held_out"]), *data["mix"]]


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
    found = []
    for key in [key for key in sorted(old | new) if old.get(key) != new.get(key)]:
        if not key.startswith(f"{FILES}."):
            found.append(f"{key} was {old.get(key, 'left out')}, is {new.get(key, 'left out')}")
        elif key in old and key in new:  # else the recipe names another file, which is said already
            found.append(f"the content of {key.removeprefix(f'{FILES}.')} has changed")
    return ", ".join(found)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key, without those that are None."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return {key: value for key, value in found.items() if value is not None}
