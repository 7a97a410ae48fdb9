"""Whether the folder of a result is that of the recipe at hand, or of another one.

A report holds the recipe as it ran: with the values that rules filled in, and with names in place of local paths. So
only what is asked for now is compared with it, and paths by their last part. Data files are compared by their hashes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import HfDmsError
from ..report.numbers import REPORT, without_local_paths
from ..training.distributed import print_on_main
from .recipe import LENGTHS, Recipe
from .unfinished import (
    FILES,
    flat,
    hashes_by_key,
    hashes_of_data,
    influences,
    lasting,
    plain_values,
    read_claim,
    remove_unfinished,
)


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
    if changed := _changed_since(before, recipe) or _changed_data(report.get("data"), recipe):
        raise HfDmsError(
            f"{output} holds the finished result of another recipe: {changed}. Choose another output.path, or set "
            "output.overwrite: true."
        )
    if measured := _differences(before, plain_values(recipe), "eval"):
        print_on_main(f"{measured}: a finished result is not measured again. `hf-dms eval` measures it.")
    # Killed between the writing of the result and the removal of its folder. Another recipe's folder is not touched.
    claimed = read_claim(unfinished)
    if isinstance(claimed, dict):
        claimed.pop(FILES, None)
    if not unfinished.exists() or claimed == plain_values(recipe):
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
    now = influences(plain_values(recipe), "search")
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
    after = _differences(report, plain_values(recipe), "recover")
    return ", ".join([*sorted(found), *([after] if after else [])])


def _changed_data(before: Any, recipe: Recipe) -> str:
    """The keys of data whose content a finished result was not made with, in words. Old reports have no hashes."""
    plain = plain_values(recipe)
    now = hashes_by_key(plain | {FILES: hashes_of_data(plain)}) if isinstance(before, dict) else {}
    return ", ".join(f"the content of {key} has changed" for key in now if key in before and before[key] != now[key])


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
    return flat(lasting(values.pop("train", None) or {}) | values)


def _same(was: Any, now: Any, key: str) -> bool:
    """Whether a value of a report is that of a recipe, whose local paths the report shortens to `.../name`."""
    if isinstance(was, str) and was.startswith(".../") and isinstance(now, str):
        return Path(was).name == Path(now).name  # also if nothing is there any more
    return was in (now, without_local_paths(now, key))
