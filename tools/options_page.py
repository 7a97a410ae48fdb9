"""The page of all options, written from the `help` texts of the dataclasses that read a recipe.

`python tools/options_page.py docs/options.md` renews it.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from hf_dms.config import DMSConfig
from hf_dms.experiment.recipe import SECTIONS
from hf_dms.experiment.sections import RecoverConfig, RepairConfig, SupernetConfig
from hf_dms.tasks.data import DataConfig
from hf_dms.training.distillation import DistillationConfig

BEGIN = "<!-- renewed by `python tools/options_page.py docs/options.md` -->"
END = "<!-- end of the options -->"
REST: dict[str, type] = {
    "model.supernet": SupernetConfig,
    "recover": RecoverConfig,
    "recover.repair": RepairConfig,
    "recover.distillation": DistillationConfig,
}
OWN_SECTIONS = {"model.supernet", "recover.repair", "recover.distillation"}  # keys that have a table of their own
CODE = re.compile(r"`[^`]*`|\{(?:[^{}]|\{[^{}]*\})*\}")  # text that Markdown must not interpret


def renewed(text: str) -> str:
    """A text whose options, between `BEGIN` and `END`, are those of the dataclasses."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """A Markdown table for each section of a recipe, the search's own first."""
    order = {"dms": DMSConfig, "model": SECTIONS["model"], "data": DataConfig}
    return "\n\n".join(_table(name, cls) for name, cls in (order | SECTIONS | REST).items())


def _table(section: str, cls: Any) -> str:
    rows = [f"## {section}", "", "| option | default | meaning |", "|---|---|---|"]
    for option in dataclasses.fields(cls):
        if f"{section}.{option.name}" == "recover.train":
            continue  # it has no keys of its own, but those of TrainingArguments
        if f"{section}.{option.name}" in OWN_SECTIONS:
            rows.append(f"| `{option.name}` | | A section of its own, [below](#{section}{option.name}). |")
        else:
            rows.append(f"| `{option.name}` | {_default(option)} | {_prose(option.metadata['help'])} |")
    return "\n".join(rows)


def _default(option: dataclasses.Field) -> str:
    text = option.metadata["help"]
    if "Required" in text:
        return "required"
    make: Any = option.default_factory
    value = option.default if make is dataclasses.MISSING else make()
    return "" if value in (None, {}, [], "") else f"`{value}`"


def _prose(text: str) -> str:
    """A help text as Markdown: braces as code, and no bar that would end the cell."""
    text = text.removesuffix(" Required.")  # the column before shows it
    marked = CODE.sub(lambda match: match[0] if match[0].startswith("`") else f"`{match[0]}`", text)
    return marked.replace("|", "\\|")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
