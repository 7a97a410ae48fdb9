"""COCO's mean average precision, by pycocotools: over IoU thresholds 0.50, 0.55, ... 0.95 and classes.

Boxes may be given as shares of their image: an intersection over union is the same in any unit, and the sizes of
objects do not matter here.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

TRUE, FOUND = 0.0, 1.0  # kinds of a row: a true box, or a box that the model found
PARTS = 20  # number of parts of the examples, each left out once for the standard error
MOST_FOUND = 100  # COCO's own number: only this many boxes per image count, the most probable ones


def average_precision(rows: Tensor) -> tuple[float, Tensor]:
    """Mean average precision of all images, and without each of some parts of them.

    Args:
        rows: `[images, rows, 7]` float64, padded with rows of NaN: TRUE or FOUND, number of the class, probability,
            left, top, width and height of the box.

    Returns:
        The value in [0, 1], and `[parts]` float64. NaN if there is no true box.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        from pycocotools.cocoeval import COCOeval

        evaluation = COCOeval(_coco(rows, TRUE), _coco(rows, FOUND), "bbox")
        parameters = evaluation.params
        parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]  # all sizes
        parameters.maxDets = [MOST_FOUND]
        evaluation.evaluate()
        matched, parts = evaluation.evalImgs, min(PARTS, len(rows))
        values = [_mean(evaluation)]
        for part in range(parts):
            # Matching boxes is the slow part, and does not depend on other images. So it is done once, and only the
            # sums are made again without a part.
            evaluation.evalImgs = [each if each and each["image_id"] % parts != part else None for each in matched]
            values.append(_mean(evaluation))
    return values[0], torch.tensor(values[1:], dtype=torch.float64)


def _mean(evaluation: Any) -> float:
    """Mean precision over thresholds, recalls and the classes that have a true box."""
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    # pycocotools writes -1 for a class without a true box.
    return float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")


def _coco(rows: Tensor, kind: float) -> Any:
    """The rows of a kind in the form of pycocotools. Ids start at 1, because pycocotools uses 0 for no match."""
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
