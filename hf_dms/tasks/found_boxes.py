"""The boxes that a detector finds in an image, each with a class and a probability.

The rules are those of transformers' `post_process_object_detection`. There are two kinds of detectors:

- DETR and YOLOS have a class for no object, and a softmax over all classes. A detection query finds one box, with
  the class that is most probable among the others.
- Conditional DETR and RT-DETR give each class a probability of its own, a sigmoid of its logit. The classes of a query
  do not compete, so each pair of a query and a class is a box. The most probable `MOST_FOUND` pairs of an image count.
  The postprocessing of Conditional DETR keeps as many, and COCO has this limit for an image. The postprocessing of
  RT-DETR keeps as many pairs as there are queries, usually 300. With only the best class of each query the second
  class of a box would be missing, and COCO's precision is a mean over classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..archs.registry import scores_classes_alone
from .average_precision import MOST_FOUND


def found_boxes(model: PreTrainedModel, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that a detector finds.

    Args:
        model: the detector.
        outputs: its outputs, with `pred_boxes` `[batch, queries, 4]` (centre, width and height), and `logits` `[batch,
            queries, classes]`, of which the last one is "no object" if the detector has such a class.

    Returns:
        Probabilities `[batch, found]` float64, numbers of the classes `[batch, found]`, and boxes `[batch, found, 4]`.
    """
    logits, boxes = outputs.logits.double(), outputs.pred_boxes
    if not scores_classes_alone(model.config):
        probabilities, classes = logits.softmax(-1)[..., :-1].max(-1)
        return probabilities, classes, boxes
    pairs = logits.sigmoid().flatten(1)
    probabilities, places = pairs.topk(min(MOST_FOUND, pairs.shape[1]))
    queries, classes = places // logits.shape[-1], places % logits.shape[-1]
    return probabilities, classes, boxes.take_along_dim(queries[..., None], 1)
