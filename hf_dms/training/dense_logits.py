"""The dense model as teacher of its own search: its outputs, computed with open masks, and the divergence from them.

With frozen weights (pipeline p-), the model with every mask open is the dense model, so no second copy is needed. It
works for heads that give one distribution per prediction (of a token, an example or an object query, whose box is
taught too), and for detectors with one per query and class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..archs.plain_view import base_model_of, tensor_of
from ..cut.verify import open_gates
from ..errors import HfDmsError
from ..gating.attach import gates_of
from ..tasks.registry import task_of_class
from .finetune import divergence
from .taught import without_labels

NO_DISTRIBUTION = ("regression", "multi_label_classification")  # values of a config's problem_type


def check_divergence(model: nn.Module) -> None:
    """Check that a model's head gives distributions.

    Raises:
        ValueError: the head is for regression, or for several labels at once.
    """
    base: Any = base_model_of(model)
    kind = base.config.problem_type
    task = task_of_class(type(base).__name__)
    fewest = 2 if task is None else task.fewest_classes
    if kind is None and base.config.num_labels < fewest and base.get_output_embeddings() is None:
        kind = "regression"  # transformers' own rule for a single label
    if kind in NO_DISTRIBUTION:
        raise HfDmsError(
            f"dms.kl_weight needs a head that gives a distribution over classes, got problem_type {kind}. Leave "
            "kl_weight out."
        )


@torch.no_grad()
def outputs_with_open_masks(model: PreTrainedModel, prepared: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Outputs of the dense model, from a frozen model in its search.

    Call it before the forward pass that gets a gradient: the gates hold the masks of the last forward pass.

    Args:
        model: the model with gates.
        prepared: the same model, wrapped as the Trainer calls it.
        inputs: keyword arguments of a forward pass; labels are ignored.

    Returns:
        The dense model's outputs, without a gradient.

    Raises:
        ValueError: the model returns no logits.
    """
    with open_gates(model), _dense_statistics(model):
        outputs = prepared(**without_labels(inputs))
    _logits(outputs)
    return outputs


def kl_to_dense(model: nn.Module, outputs: Any, dense: Any, labels: Any) -> Tensor:
    """KL(dense ‖ searched model) at temperature 1 over all classes, mean over predictions: a float32 scalar.

    For a detector plus the distance of its boxes, see `divergence`.

    Args:
        model: the model; a causal one predicts the label of the next position.
        outputs: outputs of the masked forward pass.
        dense: outputs of the dense model.
        labels: `[...]`; predictions with label -100 do not count. None, or boxes: all count.

    Raises:
        ValueError: the outputs have no logits, or logits without a gradient.
    """
    logits = _logits(outputs)
    if torch.is_grad_enabled() and not logits.requires_grad:
        raise HfDmsError(
            "dms.kl_weight: the Trainer below DMSMixin computes its loss without logits that have a gradient (TRL's "
            "SFTTrainer does). Write kl_weight: 1, which leaves that loss out, or 0."
        )
    return divergence(model, outputs, dense, 1.0, labels)


def _logits(outputs: Any) -> Tensor:
    if "logits" not in outputs:
        raise HfDmsError(
            f"dms.kl_weight needs a model that gives logits; this one gives {', '.join(outputs)}. Leave kl_weight out."
        )
    return outputs["logits"]


@contextlib.contextmanager
def _dense_statistics(model: nn.Module) -> Iterator[None]:
    """Context: batch norms have the dense model's running statistics. During the search these follow the masks."""
    base, dense = base_model_of(model), gates_of(model).attachment.statistics
    # Clones: the buffers themselves are overwritten in the next lines.
    moved = {name: tensor_of(base, name).clone() for name in dense}
    for name, tensor in dense.items():
        tensor_of(base, name).copy_(tensor)
    try:
        yield
    finally:
        for name, tensor in moved.items():
            tensor_of(base, name).copy_(tensor)
