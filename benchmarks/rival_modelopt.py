"""nvidia-modelopt's FastNAS beside our Taylor and our search: a trained ResNet on Fashion-MNIST, cut to the same MACs.

    python -m venv rival && rival/bin/pip install --constraint constraints.txt -e . nvidia-modelopt==0.47.0 \\
        torchprofile==0.0.4 omegaconf
    rival/bin/python benchmarks/rival_modelopt.py DATA_FOLDER [--share 0.6] [--seeds 0 1 2]

DATA_FOLDER: models/fashion-mnist, which `hf-dms fetch fashion-mnist` makes. A basic ResNet (32, 64, 128 channels, two
blocks a stage, 28 × 28 grey pixels) trains for six epochs. FastNAS cuts it to a share of its MACs, in multiples of 32
channels as is its default, by the accuracy on 500 training images; ours get the MACs that it came to. Each result
trains for three more epochs, of which our search uses one. Each finished row is appended to rivals_modelopt.jsonl; rows
that are there already are skipped.
"""

import argparse
import copy
import io
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.prune as mtp
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from quality import HERE, append, rows_of
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, set_seed

from hf_dms import DMSConfig, attach_, choose_, estimate_batch_norms_, prune
from hf_dms.gating.attach import gates_of

BATCH, RATE = 64, 2e-3


class Logits(torch.nn.Module):
    """A classifier that takes pixels and gives logits, as FastNAS needs it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixels).logits


def images_of(file):
    """Pixels `[images, 1, 28, 28]` around 0, and labels."""
    rows = pq.read_table(file).to_pydict()
    images = [np.array(Image.open(io.BytesIO(each["bytes"])).convert("L")) for each in rows["image"]]
    return torch.from_numpy(np.stack(images))[:, None] / 127.5 - 1, torch.tensor(rows["label"])


def epochs_of(data, epochs, seed):
    """Batches of several epochs, each in a random order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data[1]), generator=generator)
        yield from ({"pixel_values": data[0][i], "labels": data[1][i]} for i in order.split(BATCH))


def train_(model, data, epochs, seed, after_backward=None):
    """Train all weights, with a one-cycle rate."""
    batches = list(epochs_of(data, epochs, seed))
    weights = [weight for name, weight in model.named_parameters() if "dms_gates" not in name]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=len(batches))
    model.train()
    for step, batch in enumerate(batches):
        logits = model(batch["pixel_values"])
        loss = F.cross_entropy(getattr(logits, "logits", logits), batch["labels"])
        extra = 0 if after_backward is None else gates_of(model).resource_loss(step / len(batches))
        (loss + extra).backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model, data):
    outputs = [model(pixels) for pixels in data[0].split(500)]
    logits = torch.cat([getattr(output, "logits", output) for output in outputs])
    return float((logits.argmax(-1) == data[1]).float().mean())


def macs_of(model):
    """MACs of one image, by torch's own counter."""
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops() // 2


def by_fastnas(model, data, share, seed, work):
    set_seed(seed)
    few = (data[0][:500], data[1][:500])
    config = {
        "data_loader": list(epochs_of(data, 1, seed)), "collect_func": lambda batch: batch["pixel_values"],
        "score_func": lambda cut: accuracy(cut, few), "checkpoint": str(work / "fastnas.pth"), "verbose": False,
    }  # fmt: skip
    (work / "fastnas.pth").unlink(missing_ok=True)
    pruned, _ = mtp.prune(
        Logits(model).eval(), mode="fastnas", constraints={"flops": f"{share:.0%}"}, dummy_input=data[0][:1],
        config=config,
    )  # fmt: skip
    return pruned


def request(share, **options):
    return DMSConfig(target=share, resource="macs", layout="per_layer", **options)


def by_taylor(model, data, share, seed):
    attach_(model, request(share, pipeline="p-"))
    choose_(model, "taylor", list(epochs_of(data, 1, seed))[:50])
    return prune(model)


def by_search(model, data, share, seed):
    attach_(model, request(share))
    gates = gates_of(model)
    optimizer = torch.optim.Adam([gates.prune_ratio], lr=0.02)

    def step():
        gates.update_importance_()
        optimizer.step()
        optimizer.zero_grad()

    train_(model, data, 1, seed, after_backward=step)
    pruned = prune(model)
    estimate_batch_norms_(pruned, list(epochs_of(data, 1, seed))[:20])
    return pruned


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("outputs/rival-modelopt"))
    parser.add_argument("--results", default=HERE / "rivals_modelopt.jsonl")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train, held_out = (images_of(options.data / f"{name}.parquet") for name in ("train", "heldout"))
    config = ResNetConfig(
        num_channels=1, image_size=28, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], embedding_size=32,
        layer_type="basic", num_labels=10,
    )  # fmt: skip
    for seed in options.seeds:
        done = [row for row in rows_of(options.results) if (row["share"], row["seed"]) == (options.share, seed)]
        if len(done) < 4:
            run_seed(options, config, seed, train, held_out)


def run_seed(options, config, seed, train, held_out):
    """All rows of a seed."""

    def write(way, tool, model, cut):
        row = {"share": options.share, "seed": seed, "way": way, "tool": tool, "version": version(tool)}
        append(row | {"macs": macs_of(model), "cut": cut, "accuracy": accuracy(model, held_out)}, options.results)

    set_seed(seed)
    dense = ResNetForImageClassification(config)
    train_(dense, train, 6, seed)
    write("dense", "hf_dms", dense, None)
    found = by_fastnas(copy.deepcopy(dense), train, options.share, seed, options.work)
    share = macs_of(found) / macs_of(dense)
    for way, tool, epochs in (("fastnas", "nvidia-modelopt", 3), ("taylor", "hf_dms", 3), ("search", "hf_dms", 2)):
        pruned = found
        if tool == "hf_dms":
            pruned = {"taylor": by_taylor, "search": by_search}[way](copy.deepcopy(dense), train, share, seed)
        cut = accuracy(pruned.eval(), held_out)
        train_(pruned, train, epochs, seed)
        write(way, tool, pruned, cut)


if __name__ == "__main__":
    main()
