"""Tiny detectors, and images with boxes: for the tests of object detection."""

import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessorPil,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

NAMES = ("cat", "dog", "emu")
SIDE = 16  # pixels
LARGE_SIDE = 32  # for a detector that reads three maps, the smallest of which has 1/32 of the image's side
PARTS = dict(layers=2, ffn_dim=20, attention_heads=4)
SIZES = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)


STAGES = dict(model_type="resnet", hidden_sizes=[8, 12], depths=[1, 1], embedding_size=8, out_features=["stage2"])
LEVELS = dict(model_type="rt_detr_resnet", hidden_sizes=[6, 8, 12, 16], depths=[1, 1, 1, 1], embedding_size=4) | {
    "out_features": ["stage2", "stage3", "stage4"]
}
WITH_DECODER = dict(d_model=24, num_queries=4, id2label=dict(enumerate(NAMES))) | {
    f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in PARTS.items()
}
PROCESSORS = {
    "detr": DetrImageProcessorPil,
    "conditional_detr": ConditionalDetrImageProcessorPil,
    "rt_detr": RTDetrImageProcessorPil,
}


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
    return _drawn(DetrForObjectDetection, DetrConfig(**WITH_DECODER | {"backbone_config": STAGES} | options), seed)


def conditional_detr(seed=0, **options):
    """A tiny Conditional DETR, whose classes have a probability each."""
    sizes = WITH_DECODER | {"backbone_config": STAGES} | options
    return _drawn(ConditionalDetrForObjectDetection, ConditionalDetrConfig(**sizes), seed)


def rt_detr(seed=0, **options):
    """A tiny RT-DETR, which chooses its queries in each image and trains with denoising queries."""
    widths = dict(d_model=16, encoder_hidden_dim=16, decoder_in_channels=[16] * 3, encoder_in_channels=[8, 12, 16])
    sizes = WITH_DECODER | dict(num_denoising=6, decoder_n_points=2, backbone_config=LEVELS) | widths | options
    return _drawn(RTDetrForObjectDetection, RTDetrConfig(**sizes), seed)


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


def detr_processor(model_type="detr", **options):
    """The image processor of a detector with a decoder."""
    side = LARGE_SIDE if model_type == "rt_detr" else SIDE
    return PROCESSORS[model_type](**{"size": {"height": side, "width": side}} | options)


def save(folder, model=None):
    """A folder of a detector and its processor."""
    model = model or detector()
    model.save_pretrained(folder)
    kind = model.config.model_type
    (detr_processor(kind) if kind in PROCESSORS else processor()).save_pretrained(folder)
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
