"""The pictures of docs/method.md, drawn from the operator itself: `python tools/method_figures.py docs/images`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hf_dms.report.figures import Points, lines_panel, save
from hf_dms.topk import normalize_importance, soft_topk_mask

UNITS = 64
OPTIONS = {"format": "svg", "metadata": {"Date": None}}


def write(folder: Path) -> None:
    """Write `ranks.svg` and `masks.svg`."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.randn(UNITS, generator=generator).mul(1.5).exp().sort().values
    uneven = lines_panel("uneven", "", ("unit, in order", "importance c"), {"c": _points(importance)})
    ranks = lines_panel("ranks", "", ("unit, in order", "rank c'"), {"c'": _points(normalize_importance(importance))})
    save(folder / "ranks.svg", [uneven, ranks], 2, (3.2, 2.2), font_size=9, **OPTIONS)
    series = {f"a = {a}": _points(soft_topk_mask(importance, torch.tensor(a))) for a in (0.25, 0.5, 0.75)}
    masks = lines_panel("masks", "", ("unit, in order of importance", "soft mask m"), series)
    save(folder / "masks.svg", [masks], 1, (5.0, 2.4), font_size=9, **OPTIONS)


def _points(values: torch.Tensor) -> Points:
    return list(enumerate(values.tolist()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
