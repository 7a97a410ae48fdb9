"""Objects of images in the data, each a box and a class: reading and checking a column of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import HfDmsError
from .data import DataConfig
from .labels import LabelColumn, labels_of
from .sources import Source

KEYS = ("bbox", "category")
SLACK = 1.0  # a box may exceed its image by one pixel: COCO's own boxes do, by rounding
FORM = "{bbox: [[x, y, width, height], ...], category: [label, ...]}"


def read_categories(source: Source, config: DataConfig) -> LabelColumn:
    """The labels of all objects in the rows, in order.

    Raises:
        HfDmsError: there is no such column, an object has no label, or a label is not a class.
    """
    column, objects = config.objects_column, _objects(source, config)
    names = getattr(source.rows.features[column]["category"].feature, "names", None)
    values = [(row, category) for row, each in enumerate(objects) for category in each["category"]]
    labels = labels_of(values, names, source, column)
    names = None if names is None else tuple(names)
    return LabelColumn(labels, names, lambda place: source.cell(values[place][0], column), "objects_column")


def read_boxes(source: Source, config: DataConfig) -> list[Tensor]:
    """The boxes of every row, `[objects, 4]` float32: left, top, width and height in pixels.

    Raises:
        HfDmsError: there is no such column, or a box is not valid for any image.
    """
    column = config.objects_column
    found = []
    for row, objects in enumerate(_objects(source, config)):
        for box in objects["bbox"]:
            if fault := _fault(box):
                raise HfDmsError(
                    f"{source.cell(row, column)} has the box {box!r}, {fault}. A box is [left, top, width, height] in "
                    "pixels (COCO), inside its image. Correct it, or leave it out."
                )
        found.append(torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4))
    return found


def check_inside(boxes: Tensor, image: Any, cell: str) -> None:
    """Check that boxes lie inside their image.

    Args:
        boxes: `[objects, 4]`, as `read_boxes` returns them.
        image: the PIL image.
        cell: the cell of the data, for the error.

    Raises:
        HfDmsError: a box exceeds the image by more than a pixel, or lies wholly beside it.
    """
    ends = boxes[:, :2] + boxes[:, 2:]
    size = torch.tensor(image.size)
    exceeds = (boxes[:, :2] < -SLACK) | (ends > size + SLACK)
    beside = (boxes[:, :2] >= size) | (ends <= 0)  # nothing of it is in the image
    outside = (exceeds | beside).any(1)
    if outside.any():
        box = [round(value, 2) for value in boxes[outside][0].tolist()]
        raise HfDmsError(
            f"{cell} has the box {box}, which is not inside its image, {image.width} pixels wide and {image.height} "
            "high. A box is [left, top, width, height] in pixels (COCO), not [left, top, right, bottom] and not a "
            "share of the image. Correct it, or leave it out."
        )


def _objects(source: Source, config: DataConfig) -> list[dict[str, list]]:
    """The objects of every row, checked to have as many boxes as categories."""
    column = config.objects_column
    source.check_column(config, "objects_column")
    feature = source.rows.features[column]
    if not isinstance(feature, dict) or not all(hasattr(feature.get(key), "feature") for key in KEYS):
        raise HfDmsError(f"data.objects_column: column '{column}' of {source.path} holds {feature}, not {FORM}.")
    rows = source.rows.select_columns([column])[:][column]
    for row, objects in enumerate(rows):
        if objects is None or any(objects[key] is None for key in KEYS):
            raise HfDmsError(
                f"{source.cell(row, column)} has no objects. For an image without any write {{bbox: [], category: []}}."
            )
        boxes, categories = (len(objects[key]) for key in KEYS)
        if boxes != categories:
            raise HfDmsError(
                f"{source.cell(row, column)} has {boxes} boxes and {categories} categories. Give one category per box."
            )
    return rows


def _fault(box: Any) -> str | None:
    """What is wrong with a box, in words; None if it is valid for some image."""
    if not isinstance(box, list) or len(box) != 4:
        return "which is no list of four numbers"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
        return "whose numbers are not all finite"
    return None if box[2] > 0 and box[3] > 0 else "which has no area"
