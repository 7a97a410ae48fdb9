"""Pipeline np on Fashion-MNIST: networks found in a supernet beside hand-made, scaled and pruned ones of the same MACs.

    python benchmarks/supernet.py [--epochs 30] [--seeds 0 1 2] [--families resnet convnext] [--ways np hand ...]
                                  [--processes 4] [--work outputs/supernet] [--results benchmarks/supernet.jsonl]
    python benchmarks/supernet.py --table

Every way ends with a network of at most the MACs of the hand-made one, on 28 × 28 grey pixels, and trains for the same
number of epochs in all, counted in full: pretraining, search and the training after it share them.

    hand         the original: three stages, each twice as wide as the one before, of equal depths but the last
    width        a smaller network with all widths multiplied until it has as many MACs
    compound     the same with widths 1.1^φ and depths 1.2^φ, EfficientNet's factors at one resolution
    np           pipeline np, layout per_layer: a supernet twice as wide and 1.5 times as deep, random; the search takes
                 a tenth of the training after it, which begins with fresh weights
    np-searched  the same trained from the weights of the search
    np-uniform   the same as np with layout uniform: a stock network
    np-8, np-32  the same as np with all widths in multiples of 8 or 32 (of what the stage has, if that is less)
    p            pipeline p: the supernet trained for half of the epochs, then a search and a training of the rest
    taylor       the same trained supernet cut by one-shot Taylor, then trained for the rest

Images are shifted by up to two pixels and mirrored at random in every training. Each finished row is appended at once.
Several processes, started by `--processes` or by hand, share one folder: each takes a job that no other one works on. A
stopped run goes on.
"""

import argparse
import dataclasses
import fcntl
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ResNetConfig,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.utils import logging

from hf_dms import DMSConfig
from hf_dms.experiment.prepare import prepare
from hf_dms.experiment.recipe import build_recipe
from hf_dms.experiment.rows import append_row, provenance, read_rows
from hf_dms.experiment.stages import dense_model, recover_steps, score, search_and_cut
from hf_dms.gating.supernet import dense_resource

HERE = Path(__file__).parent
SIDE, CLASSES, BATCH, SHIFT = 28, 10, 64, 2
SUPERNET = {"width": 2, "depth": 1.5}
PLAIN = ("hand", "width", "compound")  # nothing is searched
WAYS = ("hand", "np", "width", "compound", "p", "taylor", "np-searched", "np-uniform", "np-8", "np-32")
SEARCHED = ("np-searched", "p", "taylor")  # trained on from the weights of the search
PRETRAINED = ("p", "taylor")  # one job, since they share the trained supernet
STEPS = (0.5, 0.05, 0.005)  # of φ
COMPOUND = {"width": 1.1, "depth": 1.2}  # per φ: Tan and Le, arXiv 1905.11946, section 5
RATE = 2e-3
ROWS, FEW, IMAGES = 6000, "few.parquet", "images.pt"
SHAPES = {  # family: (widths, depths) of the hand-made network, and of the one that is scaled
    "resnet": (([32, 64, 128], [2, 2, 2]), ([16, 32, 64], [1, 1, 1])),
    "convnext": (([24, 48, 96], [2, 2, 4]), ([12, 24, 48], [1, 1, 2])),
}


# ---- shapes ----------------------------------------------------------------------------------------------------------
def config_of(family, widths, depths):
    """The stock config of a network in three stages."""
    common = dict(num_channels=1, image_size=SIDE, hidden_sizes=list(widths), depths=list(depths), num_labels=CLASSES)
    if family == "convnext":
        return ConvNextConfig(**common, num_stages=len(depths), patch_size=2)
    return ResNetConfig(**common, layer_type="basic", embedding_size=widths[0])


def macs_of(config):
    """MACs of a forward pass of one image."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    return dense_resource(model, DMSConfig(target=1.0, resource="macs"))


def scaled(family, budget, width, depth):
    """The family's small network, scaled up to a budget: widths times width^φ, depths times depth^φ, rounded up.

    Where one more layer would be too much, widths alone grow on.
    """
    widths, depths = SHAPES[family][1]

    def at(phi, deeper):
        return [round(n * width**phi) for n in widths], [math.ceil(n * depth**deeper - 1e-9) for n in depths]

    def fits(phi, deeper):
        return macs_of(config_of(family, *at(phi, deeper))) <= budget

    phi = 0.0
    for step in STEPS:
        while fits(phi + step, phi + step):
            phi += step
    deeper = phi
    for step in STEPS:
        while fits(phi + step, deeper):
            phi += step
    return config_of(family, *at(phi, deeper))


def config_for(family, way):
    """The network that a way begins with, or for a supernet the one that it enlarges."""
    hand = config_of(family, *SHAPES[family][0])
    if way in ("width", "compound"):
        factors = {"width": 1.1, "depth": 1.0} if way == "width" else COMPOUND
        return scaled(family, macs_of(hand), **factors)
    return hand


# ---- data ------------------------------------------------------------------------------------------------------------
class Moved(Dataset):
    """Images in memory, each mirrored and shifted at random when it is asked for.

    Args:
        pixels: `[images, 1, height, width]`.
        labels: `[images]`.
    """

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        images = self.pixels[indices]
        mirrored = torch.rand(len(indices)) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        padded = torch.nn.functional.pad(images, [SHIFT] * 4, value=float(self.pixels.min()))
        places = torch.randint(0, 2 * SHIFT + 1, (len(indices), 2)).tolist()
        images = [image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(padded, places)]
        return [{"pixel_values": image, "labels": int(self.labels[i])} for image, i in zip(images, indices)]


def decode(options):
    """Decode all images once for all processes, and write a few beside them for recipes to be checked with."""
    rows = pq.read_table(options.data / "train.parquet")
    pq.write_table(rows.slice(0, 300), options.work / FEW)
    prepared = prepared_of(options, "resnet", "hand", 0, options.work / "first", data=options.data)
    examples = {"train": prepared.examples.train, "held_out": prepared.examples.held_out}
    images = {name: prepared.examples.collate([each[i] for i in range(len(each))]) for name, each in examples.items()}
    torch.save(images, options.work / f"{IMAGES}.part")
    os.replace(options.work / f"{IMAGES}.part", options.work / IMAGES)


def in_memory(prepared, folder):
    """A prepared recipe, on all images. Training images are moved at random."""
    images = torch.load(folder / IMAGES)
    pixels, labels = (images["held_out"][name] for name in ("pixel_values", "labels"))
    held_out = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels)]
    train = Moved(images["train"]["pixel_values"], images["train"]["labels"])
    examples = dataclasses.replace(prepared.examples, train=train, held_out=held_out)
    return dataclasses.replace(prepared, examples=examples, recover_examples=examples)


# ---- jobs ------------------------------------------------------------------------------------------------------------
def steps_of(way, epochs):
    """Optimizer steps of each stage of a way. Together they are the steps of all epochs."""
    total = round(epochs * ROWS / BATCH)
    before = total // 2 if way in PRETRAINED else 0
    if way in PLAIN:
        return {"finetune": total}
    if way == "taylor":
        return {"finetune": before, "search": 20, "recover": total - before}
    search = (total - before) // 11
    first = {"finetune": before} if before else {}
    return first | {"search": search, "recover": total - before - search}


def prepared_of(options, family, way, seed, folder, trained=None, data=None):
    """The recipe of a way, checked.

    Args:
        options: of the command line.
        family, way, seed: of the row.
        folder: where it works.
        trained: folder of a trained supernet. Default: random weights.
        data: folder of the images. Default: the few.
    """
    steps, source = steps_of(way, options.epochs), trained or folder / "original"
    if trained is None:
        config_for(family, way).save_pretrained(source)
        size = {"height": SIDE, "width": SIDE}
        ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(source)
    dms = {"target": 1.0, "resource": "macs", "layout": "per_layer", "pipeline": "p" if trained else "np"}
    dms |= {"strategy": "taylor"} if way == "taylor" and trained else {}
    dms |= {"layout": "uniform"} if way == "np-uniform" else {}
    dms |= {"round_to": round_to(family, int(way[3:]))} if way in ("np-8", "np-32") else {}
    train = {
        "per_device_train_batch_size": BATCH, "learning_rate": RATE, "weight_decay": 0.05, "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine", "seed": seed, "save_strategy": "no", "logging_steps": 100, "disable_tqdm": True,
    }  # fmt: skip
    model = {"path": str(source), "task": "image-classification", "dtype": "float32"}
    here = {"path": str(options.work / FEW), "held_out": 0.5}
    if data is not None:
        here = {"path": str(data / "train.parquet"), "held_out": str(data / "heldout.parquet")}
    values = {
        "model": model if trained or way in PLAIN else model | {"supernet": SUPERNET},
        "data": here,
        "finetune": {"max_steps": steps["finetune"]} if "finetune" in steps and not trained else {},
        "dms": dms,
        "train": train | {"max_steps": steps.get("search", 20)},
        "recover": {"max_steps": steps.get("recover", 200), "weights": "searched" if way in SEARCHED else None},
        "eval": {"batch_size": 250, "samples": 0},
        "output": {"path": str(folder / "out")},
    }
    return prepare(build_recipe(values), folder)


def round_to(family, step):
    """Multiples of all widths, by the word for all stages."""
    return {"hidden": step} | ({"mid": step} if family == "resnet" else {"mlp": step})


def run_job(options, family, seed, ways, write):
    """Make the rows of ways that belong together."""
    folder = options.work / f"{family}-{'+'.join(ways)}-{seed}-{options.epochs:g}"
    shutil.rmtree(folder, ignore_errors=True)
    budget = macs_of(config_for(family, "hand"))
    if ways[0] in PRETRAINED:
        trained, share = train_supernet(options, family, seed, folder, write)
    for way in ways:
        started, steps = time.time(), steps_of(way, options.epochs)
        if way in PRETRAINED:
            prepared = prepared_of(options, family, way, seed, folder / way, trained)
            dms = dataclasses.replace(prepared.recipe.dms, target=share)
            prepared = dataclasses.replace(prepared, recipe=dataclasses.replace(prepared.recipe, dms=dms))
        else:
            prepared = prepared_of(options, family, way, seed, folder / way)
        prepared = in_memory(prepared, options.work)
        model = begun(prepared, seed)
        if way in PLAIN:
            config = model.config
            shape = {"macs": macs_of(config), "sizes": {"hidden": config.hidden_sizes, "layers": config.depths}}
            write(way, row_of(prepared, model, started) | {"steps": steps} | shape)
            continue
        searched = search_and_cut(model, prepared)
        kept = searched.costs["pruned"]["macs_per_token"]
        assert kept <= budget, f"{way} has {kept} MACs, more than {budget}"
        found = {"macs": kept, "sizes": searched.costs["sizes"], "outcome": searched.outcome}
        cut = float(score(searched.pruned, prepared).mean())
        for _ in recover_steps(searched.pruned, searched.model, searched.plan, prepared):
            pass
        write(way, row_of(prepared, searched.pruned, started) | {"steps": steps, "cut": cut} | found)
    shutil.rmtree(folder)


def train_supernet(options, family, seed, folder, write):
    """Folder of a trained supernet, and the share of its MACs that the hand-made network has."""
    started, steps = time.time(), steps_of("p", options.epochs)
    prepared = in_memory(prepared_of(options, family, "p", seed, folder / "supernet"), options.work)
    model, trained = begun(prepared, seed), folder / "trained"
    write("supernet", row_of(prepared, model, started) | {"steps": {"finetune": steps["finetune"]}})
    model.save_pretrained(trained)
    prepared.processor.save_pretrained(trained)
    return trained, prepared.recipe.dms.target


def begun(prepared, seed):
    """The network that a way begins with, trained as far as its recipe says."""
    set_seed(seed)
    return dense_model(prepared).to(prepared.arguments["search"].device).eval()


def row_of(prepared, model, started):
    """The result of a network. `right` has a digit for each held-out image."""
    scores = score(model, prepared)
    return {
        "accuracy": float(scores.mean()),
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - started, 1),
        "right": "".join(str(int(value)) for value in scores.tolist()),
    }


def jobs_of(options):
    """Family, seed and ways of each job, all of a seed before the next one."""
    alone = [(way,) for way in options.ways if way not in PRETRAINED]
    together = tuple(way for way in PRETRAINED if way in options.ways)
    groups = ([together] if together else []) + alone  # the longest first
    return [(family, seed, ways) for seed in options.seeds for ways in groups for family in options.families]


def work(options):
    """Do one job after the other: those whose rows are missing, and that no other process works on."""
    for family, seed, ways in jobs_of(options):
        with (options.work / f"{family}-{'+'.join(ways)}-{seed}.lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            keys = [{"family": family, "way": way, "seed": seed, "epochs": options.epochs} for way in ways]
            done = [row["cell"] for row in read_rows(options.results)]
            if all(key in done for key in keys):
                continue

            def write(way, row, family=family, seed=seed):
                cell = {"family": family, "way": way, "seed": seed, "epochs": options.epochs}
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                append_row(options.results, {"cell": cell} | row | provenance(device))
                print(family, way, seed, f"{row['accuracy']:.4f}", f"{row['seconds']} s", flush=True)

            run_job(options, family, seed, ways, write)


# ---- the table -------------------------------------------------------------------------------------------------------
def table(rows):
    """Markdown: per family, epochs and way the accuracy and its difference from np, paired by seed and image."""
    columns = ("network", "epochs", "way", "seeds", "MACs", "parameters", "held-out accuracy", "way − np, points")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    groups = {}
    for row in rows:
        cell = row["cell"]
        groups.setdefault((cell["family"], cell["epochs"], cell["way"]), {})[cell["seed"]] = row
    for (family, epochs, way), seeds in sorted(groups.items(), key=_place):
        ordered = [seeds[seed] for seed in sorted(seeds)]
        mean = sum(row["accuracy"] for row in ordered) / len(ordered)
        single = ", ".join(f"{row['accuracy']:.4f}" for row in ordered)
        macs = f"{max(row['macs'] for row in ordered) / 1e6:.2f}M" if "macs" in ordered[0] else ""
        params = sum(row["params"] for row in ordered) / len(ordered)
        difference = "" if way == "np" else _difference(seeds, groups.get((family, epochs, "np"), {}))
        cells = (family, f"{epochs:g}", way, f"{len(ordered)}", macs, f"{params / 1e3:.0f}K", f"{mean:.4f} ({single})")
        lines.append(f"| {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def _place(group):
    (family, epochs, way), _ = group
    order = [*WAYS, "supernet"]
    return list(SHAPES).index(family), epochs, order.index(way)


def _difference(seeds, reference):
    """Accuracy beyond np's in points, over the seeds that both have, with the standard error over the images."""
    both = seeds.keys() & reference.keys()
    if not both:
        return ""
    bits = [torch.tensor([[int(b) for b in of[seed]["right"]] for seed in sorted(both)]) for of in (seeds, reference)]
    each = (bits[0] - bits[1]).double().mean(0)  # of an image, over the seeds
    return f"{100 * each.mean():+.2f} ± {100 * each.std() / math.sqrt(len(each)):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("models/fashion-mnist"))
    parser.add_argument("--work", type=Path, default=Path("outputs/supernet"))
    parser.add_argument("--results", type=Path, default=HERE / "supernet.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows(options.results)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if not (options.work / IMAGES).is_file():
        decode(options)
    if options.processes > 1:
        place = sys.argv.index("--processes")
        words = [*sys.argv[:place], *sys.argv[place + 2 :]]
        running = [subprocess.Popen([sys.executable, *words]) for _ in range(options.processes)]
        sys.exit(max(process.wait() for process in running))
    work(options)


if __name__ == "__main__":
    main()
