"""How fast cuts are, beside what their MACs promise: `python benchmarks/speed.py [CUT ...] [--folder FOLDER]`.

Speed depends on sizes alone. So no search chooses the units, and the cuts are of no other use. SmolLM2-135M
(models/smollm2-135m) is cut to half of the MACs of its layers, and reads 512 tokens and decodes 16 more in float32; a
random ResNet-50 is cut to half of its MACs at 224 × 224 pixels. Rows are added to speed.jsonl, for RESULTS.md.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification

from hf_dms import DMSConfig, prune, save_pruned
from hf_dms.measure.bench import bench, bench_table

ROWS = Path(__file__).with_suffix(".jsonl")
TEXT = {"target": 0.5, "resource": "macs", "resource_scope": "layers", "sequence_length": 512}
IMAGES = {"target": 0.5, "resource": "macs"}
CUTS = {
    "text, kv, mlp in 64s, layers": TEXT | {"prune": ("kv", "mlp", "layers"), "round_to": {"mlp": 64}},
    "text, kv, mlp and hidden in 64s, layers": TEXT | {"round_to": {"mlp": 64, "hidden": 64}},
    "text, kv, mlp in 64s": TEXT | {"prune": ("kv", "mlp"), "round_to": {"mlp": 64}},
    "text, kv, mlp, hidden, layers": TEXT,
    "images, every dim, one size a stage": IMAGES,
    "images, inside the blocks, layer by layer": IMAGES
    | {"prune": ("reduced", "mid", "layers"), "layout": "per_layer"},
}
TIMED = {"text": {"batch_sizes": (1,), "sequence_length": 512, "new_tokens": 16}, "images": {"batch_sizes": (4,)}}


def dense(kind: str, folder: Path):
    """The model that is cut, and the folder in which it lies."""
    if kind == "text":
        source = Path(__file__).parents[1] / "models" / "smollm2-135m"
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), source
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig())
    model.save_pretrained(folder / "dense")
    return model, folder / "dense"


def main(cuts: list[str], folder: Path) -> None:
    for number, cut in enumerate(cuts):
        kind = cut.partition(",")[0]
        model, source = dense(kind, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no search has run
            save_pruned(prune(model, DMSConfig(**CUTS[cut])), folder / str(number))
        result = bench(str(folder / str(number)), baseline=str(source), repeats=5, **TIMED[kind])
        print(bench_table(result), flush=True)
        for of_model, name in zip(result["models"], ("dense", "cut"), strict=True):
            of_model["path"] = name
        with ROWS.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({"cut": cut, **result}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuts", nargs="*", default=list(CUTS), help=f"of {'; '.join(CUTS)}; default: all")
    parser.add_argument("--folder", type=Path, help="where models go; default: a temporary one")
    options = parser.parse_args()
    main(options.cuts, options.folder or Path(tempfile.mkdtemp()))
