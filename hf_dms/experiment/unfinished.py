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
from ..report.numbers import without_local_paths
from ..training.distributed import print_on_main
from .recipe import LENGTHS, Recipe

CLAIM = "recipe.json"
FILES = "files"  # key of the hashes of data files, beside the sections of the recipe in that file
STAGES = {"finetune": "fine-tuned model", "search": "search", "recover": "training after the cut"}  # by folder
IDLE = (  # prefixes of keys of TrainingArguments that do not influence weights or ratios
    "logging_", "save_", "log_", "report_to", "run_name", "disable_tqdm", "dataloader_num_workers",
    "dataloader_prefetch", "dataloader_pin", "dataloader_persistent",
)  # fmt: skip


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
    now, before = plain_values(recipe), read_claim(unfinished)
    now[FILES] = hashes_of_data(now)
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
        "finetune": lasting(recipe["finetune"]),
        "train": {key: value for key, value in lasting(train).items() if key not in LENGTHS},
        # The fine-tuning before a search depends on the pipeline only in that np begins with random weights.
        "dms": {"pipeline": "np" if dms["pipeline"] == "np" else "p or p-"},
    }
    if model["supernet"] is not None:  # these decide which of its dims are larger
        found["dms"] |= {"prune": dms["prune"], "protect": dms["protect"]}
    if stage == "finetune":
        return found
    found["model"]["quantization"] = model["quantization"]
    found["train"] = lasting(train)
    # `max_nonfinite_steps` decides when a search gives up, not where it goes.
    found["dms"] = {key: value for key, value in dms.items() if key != "max_nonfinite_steps"}
    found["lora"] = recipe["lora"]
    # Evaluations can choose the best checkpoint, and so the number of examples matters.
    if train.get("eval_strategy") not in (None, "no", False):
        found["eval"] = {"examples": recipe["eval"]["examples"]}
    if stage == "recover":
        recover = dict(recipe["recover"])
        found["recover"] = lasting(recover.pop("train") or {}) | recover
        if recover["data"] is not None:
            found[FILES] |= _hashes_of(recipe, recover["data"])
    return found


def hashes_of_data(recipe: dict[str, Any]) -> dict[str, str]:
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


def hashes_by_key(recipe: dict[str, Any]) -> dict[str, str]:
    """The hashes beside a plain recipe, by the recipe's key: data.path, data.mix..../more.jsonl."""
    hashes: dict[str, str] = recipe[FILES]
    paths: dict[str, str] = {}
    for name, data in {"data": recipe["data"], "recover.data": recipe["recover"]["data"]}.items():
        if data is not None:
            paths |= {f"{name}.{key}": data[key] for key in ("path", "held_out")}
            paths |= {f"{name}.mix.{without_local_paths(path, 'path')}": path for path in data["mix"]}
    return {key: hashes[path] for key, path in paths.items() if path in hashes}


def _hashes_of(recipe: dict[str, Any], data: dict[str, Any]) -> dict[str, str]:
    """Those of the hashes beside a plain recipe that belong to a data section."""
    hashes = recipe.get(FILES, {})
    return {path: hashes[path] for path in _paths_of(data) if path in hashes}


def _paths_of(data: dict[str, Any]) -> list[str]:
    """What a data section names: files, folders and Hub ids. A share that is held out is among them, and is no file."""
    return [data["path"], str(data["held_out"]), *data["mix"]]


def lasting(given: dict[str, Any]) -> dict[str, Any]:
    """Keys of `TrainingArguments` that influence the result. If the best checkpoint is kept, the saving keys do too."""
    if given.get("load_best_model_at_end"):
        return given
    return {key: value for key, value in given.items() if not key.startswith(IDLE)}


def plain_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values of JSON."""
    # Through JSON, so that tuples and numbers compare equal to what was read from the file.
    return json.loads(json.dumps(recipe.to_dict()))


def read_claim(unfinished: Path) -> Any:
    """The recipe in the folder; None if there is no file, and a text (which is no recipe) if it cannot be read."""
    file = unfinished / CLAIM
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        return file.name


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys that differ, in words; empty if none differs."""
    old, new = flat(before), flat(now)
    found = []
    for key in [key for key in sorted(old | new) if old.get(key) != new.get(key)]:
        if not key.startswith(f"{FILES}."):
            found.append(f"{key} was {old.get(key, 'left out')}, is {new.get(key, 'left out')}")
        elif key in old and key in new:  # else the recipe names another file, which is said already
            found.append(f"the content of {key.removeprefix(f'{FILES}.')} has changed")
    return ", ".join(found)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key, without those that are None."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return {key: value for key, value in found.items() if value is not None}
