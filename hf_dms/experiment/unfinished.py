"""The folder of a run that has not ended, beside its output: whose it is, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..checkpoint.folders import check_writable, replace_folder
from ..errors import HfDmsError
from ..report.numbers import REPORT
from .prepare import check_recipe
from .recipe import Recipe

CLAIM = "recipe.json"


def may_start(recipe: Recipe, output: Path, unfinished: Path) -> bool:
    """Check a recipe and claim its folder; False if the result is there already."""
    if (output / REPORT).is_file() and not recipe.output.overwrite:
        if _is_claimed(unfinished, recipe) or not unfinished.exists():
            tidy(unfinished, output)  # if it was killed when all was saved
        return False
    check_writable(output, recipe.output.overwrite)
    check_recipe(recipe)
    _claim(unfinished, recipe)
    return True


def tidy(unfinished: Path, output: Path) -> None:
    """Remove the folder of a run that is finished, but for what TensorBoard reads, which goes into the result."""
    for logs in unfinished.glob("*/runs"):
        shutil.copytree(logs, output / "runs" / logs.parent.name, dirs_exist_ok=True)
    replace_folder(unfinished)


def _claim(unfinished: Path, recipe: Recipe) -> None:
    """Make the folder of an unfinished run, or check that an existing one is this recipe's."""
    mark = unfinished / CLAIM
    if mark.is_file() and not _is_claimed(unfinished, recipe):
        raise HfDmsError(
            f"{unfinished} holds an unfinished run of another recipe. Run that one again to finish it, "
            "choose another output.path, or delete the folder."
        )
    unfinished.mkdir(parents=True, exist_ok=True)
    mark.with_suffix(".tmp").write_text(_content(recipe), encoding="utf-8")
    os.replace(mark.with_suffix(".tmp"), mark)


def _is_claimed(unfinished: Path, recipe: Recipe) -> bool:
    mark = unfinished / CLAIM
    return mark.is_file() and mark.read_text(encoding="utf-8") == _content(recipe)


def _content(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n"
