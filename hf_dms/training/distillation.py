"""Options of distillation in the training after the cut. This file imports no torch, so that recipes check quickly."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import HfDmsError


@dataclass
class DistillationConfig:
    """The `recover.distillation` section: the dense model teaches the pruned one (Hinton et al., arXiv 1503.02531)."""

    weight: float = field(
        default=0.5,
        metadata={"help": "Share of the teacher in the loss, in (0, 1]. The rest is the loss on the labels."},
    )
    temperature: float = field(
        default=2.0, metadata={"help": "Temperature: the logits of both models are divided by it."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise HfDmsError(f"recover.distillation.weight must be in (0, 1], got {self.weight}.")
        if not self.temperature > 0:
            raise HfDmsError(f"recover.distillation.temperature must be above 0, got {self.temperature}.")
