"""Make transformers' Auto classes know the per-layer classes."""

from __future__ import annotations

import sys
from pathlib import Path


def register_unless_command_line() -> None:
    """Register now, except in the `hf-dms` command, which does it when a command runs.

    It takes transformers' config classes, seconds of import time that `hf-dms --help` should not wait for.
    """
    if Path(sys.argv[0] if sys.argv else "").stem != "hf-dms":
        register()


def register() -> None:
    """Register the per-layer config of every supported architecture; the first one made registers its models."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from .archs import ARCHS
    from .modeling_dms import dms_config_class

    for model_type in ARCHS:
        config_class = dms_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
