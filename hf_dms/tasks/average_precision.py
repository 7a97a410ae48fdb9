"""COCO's mean average precision, by pycocotools: over IoU thresholds 0.50, 0.55, ... 0.95 and classes.

Boxes may be shares of their image: an intersection over union is the same in any unit, and sizes of objects do not
count here.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

TRUE, FOUND = 0.0, 1.0  # kinds of a row
PARTS = 20  # that are left out in turn
MOST_FOUND = 100  # boxes of an image that count, the likeliest first


def average_precision(rows: Tensor) -> tuple[float, Tensor]:
    """Mean average precision of all images, and without each of some parts of them.

    Args:
        rows: `[images, rows, 7]` float64, filled up with rows of NaN: TRUE or FOUND, number of the class, probability,
            left, top, width and height of the box.

    Returns:
        The value in [0, 1], and `[parts]` float64. NaN where there is no true box.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says what it does
        from pycocotools.cocoeval import COCOeval

        evaluation = COCOeval(_coco(rows, TRUE), _coco(rows, FOUND), "bbox")
        parameters = evaluation.params
        parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]  # all sizes
        parameters.maxDets = [MOST_FOUND]
        evaluation.evaluate()
        matched, parts = evaluation.evalImgs, min(PARTS, len(rows))
        values = [_mean(evaluation)]
        for part in range(parts):
            evaluation.evalImgs = [each if each and each["image_id"] % parts != part else None for each in matched]
            values.append(_mean(evaluation))
    return values[0], torch.tensor(values[1:], dtype=torch.float64)


def _mean(evaluation: Any) -> float:
    """Over thresholds, recalls and the classes that have a true box."""
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    return float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")


def _coco(rows: Tensor, kind: float) -> Any:
    """The rows of a kind as pycocotools takes them; they are numbered from 1, since it takes 0 for no match."""
    from pycocotools.coco import COCO

    coco, annotations = COCO(), list[dict[str, Any]]()
    for image, found in enumerate(rows):
        for _, number, score, *box in found[found[:, 0] == kind].tolist():
            about = {"id": len(annotations) + 1, "image_id": image, "category_id": int(number), "score": score}
            annotations.append(about | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    classes = rows[..., 1][rows[..., 0].isfinite()].unique().tolist()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "annotations": annotations,
        "categories": [{"id": int(number)} for number in classes],
    }
    coco.createIndex()
    return coco
