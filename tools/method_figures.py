"""The pictures of the documentation: `python tools/method_figures.py docs/images`.

Those of docs/method.md are drawn from the operator itself. That of the README is drawn from `smollm2-per-layer.json`,
the sizes that `recipes/smollm2-per-layer.yaml` found (seed 0, one CPU thread).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_dms.report.figures import Points, cut_panels, lines_panel, save
from hf_dms.topk import normalize_importance, soft_topk_mask

UNITS = 64
OPTIONS = {"format": "svg", "metadata": {"Date": None}}


def write(folder: Path) -> None:
    """Write `ranks.svg`, `masks.svg` and `smollm2-per-layer.png`."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.randn(UNITS, generator=generator).mul(1.5).exp().sort().values
    uneven = lines_panel("uneven", "", ("unit, in order", "importance c"), {"c": _points(importance)})
    ranks = lines_panel("ranks", "", ("unit, in order", "rank c'"), {"c'": _points(normalize_importance(importance))})
    save(folder / "ranks.svg", [uneven, ranks], 2, (3.2, 2.2), font_size=9, **OPTIONS)
    series = {f"a = {a}": _points(soft_topk_mask(importance, torch.tensor(a))) for a in (0.25, 0.5, 0.75)}
    masks = lines_panel("masks", "", ("unit, in order of importance", "soft mask m"), series)
    save(folder / "masks.svg", [masks], 1, (5.0, 2.4), font_size=9, **OPTIONS)
    cut = json.loads((folder / "smollm2-per-layer.json").read_text(encoding="utf-8"))
    bars = cut_panels(cut)[::-1]  # MLP first
    save(folder / "smollm2-per-layer.png", bars, 1, (7.0, 1.5), font_size=8, dpi=160, facecolor="white")


def _points(values: torch.Tensor) -> Points:
    return list(enumerate(values.tolist()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
