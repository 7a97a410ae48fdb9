"""How a search ended: whether the learned sizes meet the target, and the message for the user if they do not."""

from __future__ import annotations

from typing import TypedDict

from torch import nn
from transformers.utils import logging

from ..config import SEARCH, DMSConfig
from .attach import gates_of
from .rounding import ABOVE, BELOW, sizes_of

logger = logging.get_logger(__name__)

SHORT = 0.02  # a cut that misses the target by more than this share of it: `round_to` is too coarse


class SearchOutcome(TypedDict):
    """The result of a search, as plain values for a report. Shares are shares of the dense resource.

    Attributes:
        resource: what is limited: params, macs or kv_bytes.
        target: the share to keep.
        learned: the share that the learned ratios keep, at the time of `decide_at` or else at the end.
        cut: the share that the whole sizes of the cut keep, at most the target.
        verdict: whether `learned` is on target, above or below it.
        message: the warning for the user, empty if on target. It mentions a search only if one ran (`dms.strategy`).
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
    # After `decide_` the ratios are held at the target, so only the share from before it says what was learned.
    learned = float(gates.resource().detach()) if gates.found_resource is None else gates.found_resource
    cut = float(gates.resource(gates.dense_sizes() | sizes_of(gates)))
    verdict = _verdict(learned, config.target)
    searched = config.strategy == SEARCH
    of_search = _message(verdict, learned, cut, config) if searched else ""
    return SearchOutcome(
        resource=config.resource,
        target=config.target,
        learned=learned,
        cut=cut,
        verdict=verdict,
        message=" ".join(filter(None, [of_search, gap_in_words(cut, config)])),
    )


def warn_of_outcome(model: nn.Module) -> None:
    """Warn, once, if a search ended above or clearly below its target, or if `round_to` is too coarse for it."""
    # Once, because the trainer warns at the end of a search, and `prune` after it.
    if message := search_outcome(model)["message"]:
        logger.warning_once(message)


def warn_of_gap(model: nn.Module) -> None:
    """Warn, once, if `round_to` is too coarse for the target, on a model that was not searched."""
    if message := gap_in_words(search_outcome(model)["cut"], gates_of(model).attachment.config):
        logger.warning_once(message)


def _verdict(learned: float, target: float) -> str:
    if learned > target * (1 + ABOVE):
        return "above"
    return "below" if learned < target * (1 - BELOW) else "on target"


def _message(verdict: str, learned: float, cut: float, config: DMSConfig) -> str:
    target = config.target
    found = f"The search ended at {learned:.3f} of {_whole(config)}"
    if verdict == "above":
        return (
            f"{found}, above the target {target:.4g}: the cut shrinks all sizes beyond what was learned, to {cut:.3f}. "
            "Search for more steps, or raise dms.gate_learning_rate or dms.resource_weight."
        )
    if verdict == "below":
        # Sizes that belong together, and whole units, can leave the cut below even what was learned.
        keeps = "fills up to" if cut > learned else "keeps"
        return (
            f"{found}, below the target {target:.4g}: the cut {keeps} {cut:.3f} with sizes that were not learned. "
            "Search for more steps, or lower dms.gate_learning_rate or dms.resource_weight."
        )
    return ""


def _whole(config: DMSConfig) -> str:
    """The quantity that the shares refer to, in words."""
    return f"the searched network's {config.resource}" if config.pipeline == "np" else f"the dense {config.resource}"


def gap_in_words(cut: float, config: DMSConfig) -> str:
    """The warning that multiples of `round_to` make a cut much smaller than asked, or an empty text.

    Args:
        cut: the share of the dense resource that the cut keeps.
        config: the target and the multiples.
    """
    # Without `round_to` a cut is as near to its target as whole units allow.
    if cut >= config.target * (1 - SHORT) or not any(step > 1 for step in config.round_to.values()):
        return ""
    steps = ", ".join(f"{name}: {step}" for name, step in config.round_to.items())
    return (
        f"dms.round_to = {{{steps}}} makes the cut smaller than asked: {cut:.3f} of {_whole(config)}, "
        f"target {config.target:.4g}; one more step of any dim would exceed it. Choose smaller multiples, or a target "
        "nearer to what they allow."
    )
