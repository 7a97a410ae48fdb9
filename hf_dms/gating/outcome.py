"""How a search ended: whether what it learned is what the cut keeps, and what to say if it is not."""

from __future__ import annotations

from typing import TypedDict

from torch import nn
from transformers.utils import logging

from ..archs.plain_view import base_model_of
from .attach import gates_of
from .rounding import round_sizes

logger = logging.get_logger(__name__)

ABOVE = (
    0.01  # learned resource above the target by more than this share of it: the cut is smaller than what was learned
)
BELOW = 0.03  # below it by more than this: the search took more than it was asked for


class SearchOutcome(TypedDict):
    """What came of a search, as plain values for a report; shares are of the dense resource.

    Attributes:
        resource: what is limited: params, macs or kv_bytes.
        target: the share to keep.
        learned: the share that the learned ratios keep.
        cut: the share that the whole sizes of the cut keep, at most the target.
        verdict: on target, above or below: where `learned` is.
        message: what to tell a user about it; empty if on target.
    """

    resource: str
    target: float
    learned: float
    cut: float
    verdict: str
    message: str


def search_outcome(model: nn.Module) -> SearchOutcome:
    """How the search on a model with gates ended.

    Raises:
        ValueError: the model has no gates, or the target cannot be reached.
    """
    gates, config = gates_of(model), gates_of(model).attachment.config
    learned = float(gates.resource().detach())
    sizes = round_sizes(gates, gates.attachment.bound, config, base_model_of(model).config)
    cut = float(gates.resource(gates.dense_sizes() | sizes))
    verdict = _verdict(learned, config.target)
    return SearchOutcome(
        resource=config.resource,
        target=config.target,
        learned=learned,
        cut=cut,
        verdict=verdict,
        message=_message(verdict, learned, cut, config.target, config.resource),
    )


def say_outcome(model: nn.Module) -> None:
    """Warn, once, of a search that ended above or clearly below its target."""
    if message := search_outcome(model)["message"]:
        logger.warning_once(message)


def _verdict(learned: float, target: float) -> str:
    if learned > target * (1 + ABOVE):
        return "above"
    return "below" if learned < target * (1 - BELOW) else "on target"


def _message(verdict: str, learned: float, cut: float, target: float, resource: str) -> str:
    found = f"The search ended at {learned:.3f} of the dense {resource}"
    if verdict == "above":
        return (
            f"{found}, above the target {target:g}: the cut shrinks all sizes beyond what was learned, to {cut:.3f}. "
            "Search for more steps, or raise dms.gate_learning_rate or dms.resource_weight."
        )
    if verdict == "below":
        return (
            f"{found}, below the target {target:g}: the cut fills up to {cut:.3f} with sizes that were not learned. "
            "Search for more steps, or lower dms.gate_learning_rate or dms.resource_weight."
        )
    return ""
