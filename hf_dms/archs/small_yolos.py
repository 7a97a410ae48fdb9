"""A small YOLOS with random weights that trains on a CPU.

transformers' own random start of a YOLOS has zeros for all positions and all detection tokens, so that every token sees
every place alike and all detection tokens are one and the same. Here

- patches have the sines and cosines of their places, and each detection token those of the centre of a cell;
- queries and keys of attention start equal, so that tokens begin by attending to what is like them, in place too
  (after Trockman and Kolter, "Mimetic initialization of self-attention layers", arXiv 2305.09828);
- all other maps have the usual variance of their width in place of 0.02².

With an image processor that makes black 0, a black patch is its place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

PERIODS = 10.0  # ratio of the longest wave of a place to the shortest, which is 2π patches
TOKEN_DEVIATION = 0.1
ATTENTION_GAIN = 1.5  # standard deviation of queries and keys
SIZES: dict[str, Any] = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192)


def small_yolos(
    image_size: int, labels: Sequence[str], patch_size: int = 14, cells: int = 3, **sizes: Any
) -> YolosForObjectDetection:
    """A YOLOS for square images, its weights random.

    Args:
        image_size: side of the images, in pixels.
        labels: names of the classes.
        patch_size: side of a patch, in pixels.
        cells: the image is split into `cells` × `cells` parts, each with a detection token.
        sizes: of YolosConfig, in place of `SIZES`.
    """
    # Two sides, since the stock class indexes them. No positions between the layers: they cannot be pruned (yolos.py).
    config = YolosConfig(
        image_size=[image_size] * 2, patch_size=patch_size, num_detection_tokens=cells**2,
        use_mid_position_embeddings=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}, **SIZES | sizes,
    )  # fmt: skip
    model: Any = YolosForObjectDetection(config)
    side, width = image_size // patch_size, config.hidden_size
    with torch.no_grad():
        embeddings = model.vit.embeddings
        patches = embeddings.patch_embeddings.projection.weight
        nn.init.normal_(patches, 0, patches[0].numel() ** -0.5)
        embeddings.position_embeddings[0, 1 : 1 + side**2] = waves(torch.arange(side).float(), width)
        # Positions are counted in patches: the centre of the first one is 0.
        centres = (torch.arange(cells) + 0.5) * side / cells - 0.5
        embeddings.position_embeddings[0, 1 + side**2 :] = waves(centres, width)
        embeddings.detection_tokens.normal_(0, TOKEN_DEVIATION)
        for layer in model.vit.encoder.layer:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
            attention = layer.attention.attention
            nn.init.normal_(attention.query.weight, 0, ATTENTION_GAIN * width**-0.5)
            attention.key.weight.copy_(attention.query.weight)
        for module in (*model.class_labels_classifier.layers, *model.bbox_predictor.layers):
            module.reset_parameters()
    return model


def waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of the places in a square grid, `[places², width]`.

    Args:
        places: along one side, in patches, `[places]`.
        width: a multiple of 4: a quarter each for the sine and cosine of the column and of the row.
    """
    frequencies = PERIODS ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
