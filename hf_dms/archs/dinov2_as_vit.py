"""DINOv2-small as a stock ViT: the same function at a smaller image, with an untrained head.

DINOv2 multiplies the output of each block by a learned factor per unit. With these factors folded into the block's last
linear map, the model is a ViT. Its positions are resized to the smaller grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

PATCH_SIZE = 14  # pixels
LAYERS, WIDTH = 12, 384
TRAINED_GRID = 37  # patches per side for which the positions of DINOv2 were trained
# (module of a ViT layer, its name in DINOv2, the layer scale to fold into it)
NAMES = (
    ("layernorm_before", "norm1", None),
    ("attention.q_proj", "attention.attention.query", None),
    ("attention.k_proj", "attention.attention.key", None),
    ("attention.v_proj", "attention.attention.value", None),
    ("attention.o_proj", "attention.output.dense", "layer_scale1"),
    ("layernorm_after", "norm2", None),
    ("mlp.fc1", "mlp.fc1", None),
    ("mlp.fc2", "mlp.fc2", "layer_scale2"),
)


def as_vit(
    dino: dict[str, Tensor], first: Tensor, grid: Tensor, image_size: int, labels: Sequence[str]
) -> ViTForImageClassification:
    """A ViT with the weights of DINOv2-small.

    Args:
        dino: parameters of DINOv2-small, by their names in `Dinov2Model`.
        first: position of the class token, `[1, 1, 384]`.
        grid: positions of the patches, `[1, 37², 384]`.
        image_size: side of the ViT's images, in pixels.
        labels: names of the classes of the head, which is random.
    """
    # The epsilon is DINOv2's; a ViT's default is 1e-12.
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=6, intermediate_size=1536,
        layer_norm_eps=1e-6, image_size=image_size, patch_size=PATCH_SIZE, id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(_embeddings(dino, first, grid, image_size // PATCH_SIZE) | _layers(dino))
    return model


def _embeddings(dino: dict[str, Tensor], first: Tensor, grid: Tensor, side: int) -> dict[str, Tensor]:
    """Embeddings and the last norm; positions are resized bicubically to `side` × `side` patches."""
    grid = grid.reshape(1, TRAINED_GRID, TRAINED_GRID, WIDTH).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    state = {
        "embeddings.cls_token": dino["embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat([first, grid.flatten(2).transpose(1, 2)], 1),
    }
    for kind in ("weight", "bias"):
        projection = f"embeddings.patch_embeddings.projection.{kind}"
        state |= {projection: dino[projection], f"layernorm.{kind}": dino[f"layernorm.{kind}"]}
    return state


def _layers(dino: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers, the layer scales folded into the output projections."""
    state = {}
    for i in range(LAYERS):
        for new, old, scale in NAMES:
            for kind in ("weight", "bias"):
                tensor = dino[f"encoder.layer.{i}.{old}.{kind}"]
                if scale is not None:
                    # A factor per output of the map: per row of its weight, per entry of its bias.
                    by_row = dino[f"encoder.layer.{i}.{scale}.lambda1"]
                    tensor = tensor * (by_row[:, None] if tensor.dim() == 2 else by_row)
                state[f"layers.{i}.{new}.{kind}"] = tensor
    return state
