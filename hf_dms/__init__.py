"""hf_dms: learn how wide and how deep a Transformers model should be, and cut it to that size.

Differentiable Model Scaling (Liu et al., ICML 2024, arXiv 2405.07194). Ten files teach the method, in this order: topk
(the operator) → gates (ratios, importance, masks) → masked_ops (where a mask enters a forward pass) → archs/spec (the
language of descriptions) → archs/llama (one description) → gating/attach (where gates touch a model) → gating/hooks
(what a module does with a mask) → gating/rounding (whole sizes from learned ones) → cut/slicing (the cut) →
training/trainer (the step of a search).

After `import hf_dms`, transformers' Auto classes load checkpoints whose layers differ in width.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .cut.register import register_unless_command_line

if TYPE_CHECKING:
    from .archs.spec import ArchSpec as ArchSpec
    from .archs.spec import Dim as Dim
    from .checkpoint.hub import push as push
    from .checkpoint.save import save_pruned as save_pruned
    from .config import DMSConfig as DMSConfig
    from .cut.plan import Plan as Plan
    from .cut.prune import plan_of as plan_of
    from .cut.prune import prune as prune
    from .cut.register import register_arch as register_arch
    from .errors import HfDmsError as HfDmsError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import VerificationError as VerificationError
    from .gating.attach import attach_ as attach_
    from .gating.attach import detach_ as detach_
    from .gating.supernet import fresh_weights_ as fresh_weights_
    from .gating.supernet import supernet as supernet
    from .refit.batch_norms import estimate_batch_norms_ as estimate_batch_norms_
    from .refit.one_shot import one_shot_obs_plan as one_shot_obs_plan
    from .refit.repair import repair_ as repair_
    from .strategies.one_shot import choose_ as choose_
    from .training.trainer import DMSMixin as DMSMixin
    from .training.trainer import DMSTrainer as DMSTrainer

__version__ = "0.1.0"

# Each name is imported when it is first used (PEP 562), because `hf-dms --help` must not wait for torch.
_HOMES = {
    "ArchSpec": "archs.spec",
    "DMSConfig": "config",
    "DMSMixin": "training.trainer",
    "DMSTrainer": "training.trainer",
    "Dim": "archs.spec",
    "HfDmsError": "errors",
    "NonFiniteError": "errors",
    "Plan": "cut.plan",
    "VerificationError": "errors",
    "attach_": "gating.attach",
    "choose_": "strategies.one_shot",
    "detach_": "gating.attach",
    "estimate_batch_norms_": "refit.batch_norms",
    "fresh_weights_": "gating.supernet",
    "one_shot_obs_plan": "refit.one_shot",
    "plan_of": "cut.prune",
    "prune": "cut.prune",
    "push": "checkpoint.hub",
    "register_arch": "cut.register",
    "repair_": "refit.repair",
    "save_pruned": "checkpoint.save",
    "supernet": "gating.supernet",
}
__all__ = [*_HOMES]

register_unless_command_line()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_dms' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
