"""One search, many sizes: while the target falls, a plan is kept at every 5 %. A callback of DMSTrainer.

The plan at a size holds the ratios at the moment when the falling target was there, rounded to that size. A search with
that size as its target has more steps for it, so its result is usually better.
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
        plans: the kept plans, by the share of the dense resource.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.plans: Plans = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        gates: Gates = self.trainer.gates
        # A constant target passes no level. Without an update there is no importance to choose units by.
        if gates.schedule.target_schedule == "constant" or gates.num_updates == 0:
            return
        steps = (state.global_step - 1, state.global_step)
        before, now = (gates.target(self.trainer.progress_at(step)) for step in steps)
        config, at = self.trainer.dms_config, gates.attachment
        for level in levels_above(config.target):
            # Passed in this step, once: the target never rises.
            if now <= level < before:
                # The ratios are near this level, and rounding brings them to it exactly.
                sizes = round_sizes(gates, at.bound, replace(config, target=level), at.model_config)
                self.plans[level] = make_plan(gates, sizes)

    def save(self, folder: str | Path) -> None:
        """Write the plans, if there are any, next to the state of the search."""
        if self.plans and is_main():
            bound, layout = self.trainer.gates.attachment.bound, self.trainer.dms_config.layout
            Path(folder, PLANS_FILE).write_text(plans_to_json(self.plans, bound, layout), encoding="utf-8")

    def load_(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        there = Path(folder, PLANS_FILE).is_file()
        self.plans = load_plans(folder, self.trainer.gates.attachment.bound)[0] if there else {}
