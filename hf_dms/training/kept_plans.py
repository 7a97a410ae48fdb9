"""One search, every size: while the target falls, the plan at every 5 % is kept. A callback of DMSTrainer.

What is kept at a size is what the search had learned when its target was there: the ratios of that moment, rounded to
it. A search that ends there has more time for it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..cut.plans import PLANS_FILE, Plans, levels_above, load_plans, plans_to_json
from ..cut.prune import make_plan
from ..gates import Gates
from ..gating.rounding import round_sizes
from .distributed import is_main


class KeptPlans(TrainerCallback):
    """Keeps the plan at each level that the falling target passes.

    Args:
        trainer: a DMSTrainer.

    Attributes:
        plans: by level.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.plans: Plans = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        gates: Gates = self.trainer.gates
        if gates.schedule.target_schedule == "constant" or gates.num_updates == 0:
            return
        steps = (state.global_step - 1, state.global_step)
        before, now = (gates.target(self.trainer.progress_at(step)) for step in steps)
        config, at = self.trainer.dms_config, gates.attachment
        for level in levels_above(config.target):
            if now <= level < before:
                sizes = round_sizes(gates, at.bound, replace(config, target=level), at.model_config)
                self.plans[level] = make_plan(gates, sizes)

    def save(self, folder: str | Path) -> None:
        """Write the plans, if there are any, beside the state of the search."""
        if self.plans and is_main():
            bound, layout = self.trainer.gates.attachment.bound, self.trainer.dms_config.layout
            Path(folder, PLANS_FILE).write_text(plans_to_json(self.plans, bound, layout), encoding="utf-8")

    def load_(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        there = Path(folder, PLANS_FILE).is_file()
        self.plans = load_plans(folder, self.trainer.gates.attachment.bound)[0] if there else {}
