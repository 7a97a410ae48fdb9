"""A small detection set made of real images: Fashion-MNIST articles on black canvases, with their true boxes.

A scene is a canvas of 112 × 112 grey pixels with one to three articles. Each article is one of the given images of
28 × 28 pixels, scaled to a side between 28 and 56 pixels (bilinear), at a uniform place where it lies wholly inside the
canvas and its box overlaps no other by more than an IoU of 0.1; where no such place is found in 50 draws, the scene
stays without it. Its box is the smallest one around its pixels of at least 32 of 255. Where articles touch, the lighter
pixel is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

CANVAS = 112  # pixels, both sides; all sizes here are in pixels
SIDES = (28, 56)  # of a scaled article, smallest and largest
MOST_ARTICLES = 3
MAX_OVERLAP = 0.1  # intersection over union of two boxes
DRAWS = 50  # of a place for an article
VISIBLE = 32  # grey level from which a pixel belongs to an article

Box = tuple[int, int, int, int]  # x, y, width, height


def scenes(images: Sequence[Any], labels: Sequence[int], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a detection set.

    Args:
        images: PIL images of single articles, light on black.
        labels: the class of each one.
        count: how many scenes.
        seed: of everything random: the same arguments give the same scenes.

    Yields:
        `{"image": PIL image, "objects": {"bbox": [[x, y, width, height], ...], "category": [class, ...]}}`, boxes in
        pixels.
    """
    random = np.random.default_rng(seed)
    for _ in range(count):
        canvas = np.zeros((CANVAS, CANVAS), np.uint8)
        boxes: list[Box] = []
        categories: list[int] = []
        for _ in range(random.integers(1, MOST_ARTICLES + 1)):
            index = int(random.integers(len(images)))
            if (box := _paste_one(canvas, images[index], boxes, random)) is not None:
                boxes.append(box)
                categories.append(labels[index])
        yield {"image": _picture(canvas), "objects": {"bbox": [list(box) for box in boxes], "category": categories}}


def _paste_one(canvas: Any, image: Any, boxes: list[Box], random: np.random.Generator) -> Box | None:
    """Put an article on a canvas, which changes, and return its box; None if no place was found."""
    for _ in range(DRAWS):
        side = int(random.integers(SIDES[0], SIDES[1] + 1))
        article = np.asarray(image.convert("L").resize((side, side), resample=2))  # bilinear
        left, top = (int(place) for place in random.integers(0, CANVAS - side + 1, 2))
        # The tight box: articles have a black margin of their own.
        rows, columns = np.nonzero(article >= VISIBLE)
        box = (
            left + int(columns.min()),
            top + int(rows.min()),
            int(columns.max() - columns.min()) + 1,
            int(rows.max() - rows.min()) + 1,
        )
        if all(overlap(box, other) <= MAX_OVERLAP for other in boxes):
            part = canvas[top : top + side, left : left + side]
            np.maximum(part, article, out=part)
            return box
    return None


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes.

    Examples:
        >>> overlap((0, 0, 2, 2), (1, 0, 2, 2))
        0.3333333333333333
    """
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def _picture(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)
