"""The architectures that hf_dms knows, one description each."""

from __future__ import annotations

from typing import Any

from ..errors import HfDmsError
from .beit import BEIT, DATA2VEC_VISION
from .bert import BERT
from .bind import dim_size
from .conditional_detr import CONDITIONAL_DETR
from .convnext import CONVNEXT
from .convnextv2 import CONVNEXTV2
from .deit import DEIT
from .detr import DETR
from .dinov2 import DINOV2
from .distilbert import DISTILBERT
from .efficientnet import EFFICIENTNET
from .electra import ELECTRA
from .gemma import GEMMA, GEMMA2, GEMMA3
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .mobilenet_v2 import MOBILENET_V2
from .mobilevit import MOBILEVIT
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .regnet import REGNET
from .resnet import RESNET
from .roberta import ROBERTA
from .rt_detr import RT_DETR
from .smollm3 import SMOLLM3
from .spec import ArchSpec
from .swin import SWIN
from .vit import VIT
from .xlm_roberta import CAMEMBERT, XLM_ROBERTA
from .yolos import YOLOS

SPECS = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GRANITE, GEMMA, GEMMA2, GEMMA3),
    *(BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA),
    *(VIT, DEIT, DINOV2, BEIT, DATA2VEC_VISION, SWIN, YOLOS, DETR, CONDITIONAL_DETR, RT_DETR),
    *(CONVNEXT, CONVNEXTV2, RESNET, REGNET, MOBILENET_V2, EFFICIENTNET, MOBILEVIT),
)
ARCHS: dict[str, ArchSpec] = {spec.model_type: spec for spec in SPECS}


def class_name(config: Any) -> str:
    """The class name of a saved model, from its config; empty if the config has none."""
    # transformers writes a list, but a config that was made by hand can hold anything.
    names = config.architectures
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def dense_spec(model_type: str) -> ArchSpec:
    """The description of a supported architecture. For a per-layer type (`dms_*`), that of the dense type."""
    return ARCHS[model_type.removeprefix("dms_")]


def scores_classes_alone(config: Any) -> bool:
    """Whether a detector gives each class a probability of its own, without a class for no object."""
    # RT-DETR's prediction heads stay whole, so it has no such dim. It has no class for no object either.
    sizes = [dim_size(dim, config) for dim in dense_spec(config.model_type).dims if dim.name == "classes"]
    return config.num_labels + 1 not in sizes


def chooses_queries(config: Any) -> bool:
    """Whether a detector chooses its queries in each image, so that query 1 of two models need not mean one place."""
    return bool(dense_spec(config.model_type).query_scores)


def spec_for(config: Any) -> ArchSpec:
    """The description of a model's architecture.

    Args:
        config: the model's `PreTrainedConfig`.

    Raises:
        ValueError: the architecture is not supported, or was pruned per layer already.
    """
    model_type = config.model_type
    if model_type in ARCHS:
        return ARCHS[model_type]
    if model_type.startswith("dms_"):
        dense = ARCHS.get(model_type.removeprefix("dms_"))
        has_stock_form = dense is None or not dense.per_layer_only
        several_rounds = ", or prune in several rounds with layout: uniform, which gives stock models"
        raise HfDmsError(
            f"model type '{model_type}' was pruned by hf_dms before, with a layout that differs from layer to layer: "
            "its layers have different sizes, and gates need layers of equal size. Search the dense model again with a "
            f"smaller target{several_rounds if has_stock_form else ''}."
        )
    raise HfDmsError(
        f"model type '{model_type}' is not supported. Supported: {', '.join(sorted(ARCHS))}. "
        "To add one, see docs/new_architecture.md."
    )
