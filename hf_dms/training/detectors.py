"""How far the boxes and classes of a detector are from those of its teacher.

A detector with a class for no object has one distribution over its classes per query, and the divergence of its classes
is that of any classifier (`distillation_loss`). A detector that gives each class a probability of its own (a sigmoid,
trained by a focal loss) has a Bernoulli distribution per query and class. These distributions are independent, so the
divergence of a query is the sum of their divergences over the classes.

The cut keeps the detection queries. If they are weights of the model (DETR, Conditional DETR, YOLOS), a query of the
student learns from the teacher's query of the same number. An RT-DETR takes as queries the places of the image that
score best, so the same number means another place in the student. There, the queries of an image are paired one to one
so that the loss is as small as possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BOX_WEIGHT = 5.0  # of the distance of boxes beside the classes: λ_L1 of DETR (Carion et al., arXiv 2005.12872, 9.4)


def box_distance(student: Mapping[str, Any], teacher: Mapping[str, Any], seen: Tensor | None = None) -> Tensor | float:
    """Σ p·‖b_teacher - b_student‖₁ / Σ p over the queries of a detector, p the probability that the teacher sees an
    object there, times the weight of boxes in DETR's loss; 0 for a model without boxes.

    Args:
        student, teacher: outputs with `logits` `[batch, queries, classes + 1]`, the last class being no object, and
            `pred_boxes` `[batch, queries, 4]` relative to the image.
        seen: `[batch, queries]`, p. Default: 1 - the probability of no object.
    """
    if "pred_boxes" not in student:
        return 0.0
    if seen is None:
        seen = 1 - teacher["logits"].float().softmax(-1)[..., -1]
    distance = (teacher["pred_boxes"].float() - student["pred_boxes"].float()).abs().sum(-1)
    return BOX_WEIGHT * (seen * distance).sum() / seen.sum().clamp(min=1e-6)


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·Σ_c KL(Bernoulli(σ(t_c / T)) ‖ Bernoulli(σ(s_c / T))), mean over queries: a float32 scalar.

    The sum over the classes c is the divergence of one query, as that of `distillation_loss` is for a softmax.

    Args:
        student, teacher: logits s and t, `[batch, queries, classes]`.
        temperature: T.

    Examples:
        >>> bernoulli_divergence(torch.tensor([[[0.0]]]), torch.tensor([[[1.0986]]]), 1.0)
        tensor(0.1308)
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    # KL(p ‖ q) = p·(log p - log q) + (1 - p)·(log (1 - p) - log (1 - q)), and 1 - σ(x) = σ(-x).
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (present + absent).sum(-1).mean()


def sigmoid_divergence(
    student: Mapping[str, Any], teacher: Mapping[str, Any], temperature: float, chosen: bool
) -> Tensor:
    """`bernoulli_divergence` of the classes plus `box_distance`, p being the teacher's most probable class.

    Args:
        student, teacher: outputs with `logits` `[batch, queries, classes]` and `pred_boxes` `[batch, queries, 4]`. In
            training with labels, an RT-DETR puts noisy copies of the true boxes in front of the student's queries.
            They have no counterpart in the teacher, and do not count.
        temperature: that of the classes.
        chosen: whether the queries are chosen in each image, so that they have to be paired.
    """
    queries = teacher["logits"].shape[1]
    student = {name: student[name][:, -queries:] for name in ("logits", "pred_boxes")}
    seen = teacher["logits"].float().sigmoid().amax(-1)
    if chosen:
        order = paired(student, teacher, temperature, seen)[..., None]
        student = {name: value.take_along_dim(order, 1) for name, value in student.items()}
    divergence = bernoulli_divergence(student["logits"], teacher["logits"], temperature)
    return divergence + box_distance(student, teacher, seen)


@torch.no_grad()
def paired(student: Mapping[str, Tensor], teacher: Mapping[str, Any], temperature: float, seen: Tensor) -> Tensor:
    """For each query of the teacher, that of the student which learns from it: `[batch, queries]` int64.

    It is the one-to-one assignment with the least sum, `sigmoid_divergence` itself (Hungarian algorithm, by which
    DETR's loss assigns objects to queries).

    Args:
        student, teacher: outputs with equally many queries.
        temperature: that of the classes.
        seen: `[batch, queries]`, how sure the teacher is of an object.
    """
    from scipy.optimize import linear_sum_assignment

    logits, given = student["logits"].float() / temperature, teacher["logits"].float() / temperature
    # The divergence of each query from each other one, but for the teacher's entropy, which no assignment changes.
    classes = -given.sigmoid() @ F.logsigmoid(logits).mT - (-given).sigmoid() @ F.logsigmoid(-logits).mT
    boxes = torch.cdist(teacher["pred_boxes"].float(), student["pred_boxes"].float(), p=1)
    cost = temperature**2 * classes / seen.numel() + BOX_WEIGHT * seen[..., None] * boxes / seen.sum().clamp(min=1e-6)
    # The algorithm refuses NaN. A step without a finite loss is skipped anyway.
    pairs = [linear_sum_assignment(each)[1] for each in cost.nan_to_num().cpu().numpy()]
    return torch.stack([torch.from_numpy(each) for each in pairs]).to(seen.device)
