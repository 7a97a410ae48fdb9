"""Tiny detectors, and images with boxes: for the tests of object detection."""

import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

NAMES = ("cat", "dog", "emu")
SIDE = 16  # pixels
PARTS = dict(layers=2, ffn_dim=20, attention_heads=4)
SIZES = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)


STAGES = dict(model_type="resnet", hidden_sizes=[8, 12], depths=[1, 1], embedding_size=8, out_features=["stage2"])


def detector(seed=0, **options):
    """A tiny YOLOS whose queries find different things."""
    config = YolosConfig(
        **{
            "image_size": [SIDE, SIDE],
            "patch_size": 4,
            "num_detection_tokens": 4,
            "use_mid_position_embeddings": False,
            "id2label": dict(enumerate(NAMES)),
        }
        | SIZES
        | options
    )
    return _drawn(YolosForObjectDetection, config, seed)


def detr(seed=0, **options):
    """A tiny DETR, an encoder and a decoder behind a ResNet."""
    parts = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in PARTS.items()}
    sizes = dict(d_model=24, num_queries=4, backbone_config=STAGES, id2label=dict(enumerate(NAMES)))
    return _drawn(DetrForObjectDetection, DetrConfig(**sizes | parts | options), seed)


def _drawn(cls, config, seed):
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def processor(**options):
    return YolosImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}} | options)


def detr_processor(**options):
    return DetrImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}} | options)


def save(folder, model=None):
    """A folder of a detector and its processor."""
    model = model or detector()
    model.save_pretrained(folder)
    (detr_processor if model.config.model_type == "detr" else processor)().save_pretrained(folder)
    return folder


def pictures(count, size=(SIDE, SIDE)):
    return [Picture.effect_noise(size, 40 * i + 20).convert("RGB") for i in range(count)]


def write_scenes(path, boxes, categories, images=None, kind=None):
    """A parquet file of images with boxes; `kind` is the type of a category, by default a ClassLabel."""
    images = images or pictures(len(boxes))
    objects = [{"bbox": box, "category": category} for box, category in zip(boxes, categories)]
    form = {"bbox": List(List(Value("float32"))), "category": List(kind or ClassLabel(names=list(NAMES)))}
    features = Features({"image": Image(), "objects": form})
    Dataset.from_dict({"image": images, "objects": objects}, features=features).to_parquet(path)
    return str(path)
