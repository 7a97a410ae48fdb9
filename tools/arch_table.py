"""The table of architectures in the documentation, derived from their descriptions: what binds is supported.

`python tools/arch_table.py docs/architectures.md` renews it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_dms.archs.bind import bind
from hf_dms.archs.registry import SPECS
from hf_dms.archs.skeleton import skeleton
from hf_dms.archs.spec import ArchSpec
from hf_dms.archs.stock import limits_in_words
from hf_dms.cut.modeling_dms import AUTO_CLASSES, stock_classes

BEGIN = "<!-- renewed by `python tools/arch_table.py docs/architectures.md` -->"
END = "<!-- end of the table -->"


def renewed(text: str) -> str:
    """A text whose table of architectures, between `BEGIN` and `END`, is that of the descriptions."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(SPECS)}\n\n{END}{rest.partition(END)[2]}"


def table(specs: tuple[ArchSpec, ...]) -> str:
    """A Markdown table of architectures; those that differ in nothing else share a row."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for spec in specs:
        dims = ", ".join(f"`{name}`" for name in spec.prunable_in_words)
        stock = "; ".join(["stock", *limits_in_words(spec)]) if not spec.per_layer_only else "no: `per_layer` only"
        rows[", ".join(heads(spec)), dims, stock].append(f"`{spec.model_type}`")
    lines = [(", ".join(names), *cells) for cells, names in rows.items()]
    header = [("architectures", "heads", "dims", "`layout: uniform`"), ("---",) * 4]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in [*header, *lines])
    layouts = (
        "All of them take `layout: per_layer`, which has no such limits; those with a stock form take `padded` too."
    )
    stages = (
        "A dim\nwith `{s}` in its name exists once per stage, numbered from 0; the name without a number means all."
    )
    return f"{text}\n\n{layouts} {stages}"


def heads(spec: ArchSpec) -> list[str]:
    """In words, the Auto classes whose models of an architecture bind to its description."""
    stock: Any = CONFIG_MAPPING[spec.model_type]
    depths = {dim.name for dim in spec.dims if dim.scope == "depth"}
    one_layer = {key: 1 for key, product in spec.config.items() if product in depths and "[" not in key}
    own = {"use_timm_backbone": False}  # a backbone of transformers
    config = stock(**one_layer, **dict.fromkeys(spec.must_be_false, False), **own)
    config = stock.from_dict(json.loads(config.to_json_string(use_diff=False)))  # as from a file: lists, no tuples
    found = []
    for auto in AUTO_CLASSES:
        classes = stock_classes(auto, stock)
        if classes and all(_binds(spec, cls, config) for cls in classes):
            words = re.sub(
                r"([a-z])([A-Z])", r"\1 \2", auto.removeprefix("Auto").removeprefix("Model").removeprefix("For")
            )
            found.append(" ".join(word if word.isupper() else word.lower() for word in words.split()) or "base")
    return found


def _binds(spec: ArchSpec, cls: type, config: PreTrainedConfig) -> bool:
    try:
        bind(spec, skeleton(cls, config))
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
