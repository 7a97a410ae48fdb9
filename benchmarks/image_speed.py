"""How fast a cut ResNet-50 is, beside what its MACs promise: `python benchmarks/image_speed.py [FOLDER]`.

Speed depends on sizes alone, so the model is random and its units are chosen by their first importance, without a
search: the cuts are of no other use. Half of the MACs at 224 × 224 pixels go, once in every dim with one size for all
layers (stock), once inside the blocks, layer by layer. Rows are added to image_speed.jsonl; README.md has the table.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dms import DMSConfig, prune, save_pruned
from hf_dms.measure.bench import bench, bench_table

CUTS = {"uniform": None, "per_layer": ("reduced", "mid", "layers")}  # layout: dims
ROWS = Path(__file__).with_suffix(".jsonl")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    ResNetForImageClassification(ResNetConfig()).save_pretrained(folder / "dense")
    for layout, dims in CUTS.items():
        model = ResNetForImageClassification.from_pretrained(folder / "dense")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no search has run
            save_pruned(
                prune(model, DMSConfig(target=0.5, resource="macs", prune=dims, layout=layout)), folder / layout
            )
        result = bench(str(folder / layout), baseline=str(folder / "dense"), batch_sizes=(4,), repeats=5)
        print(bench_table(result), flush=True)
        for of_model in result["models"]:
            of_model["path"] = Path(of_model["path"]).name
        with ROWS.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({"layout": layout, "prune": dims, **result}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
