"""Make transformers' Auto classes know the per-layer classes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HfDmsError

if TYPE_CHECKING:
    from ..archs.spec import ArchSpec


def register_unless_command_line() -> None:
    """Register now, except in the commands `hf-dms` and `python -m hf_dms`, which do it when a command runs.

    Registering imports transformers' config classes. That takes seconds, and `hf-dms --help` should not wait for it.
    """
    is_script = Path(sys.argv[0] if sys.argv else "").stem == "hf-dms"
    # While Python looks for a module to run, `argv` does not have its name yet.
    if not is_script and sys.orig_argv[1:3] != ["-m", "hf_dms"]:
        register()


@functools.cache  # once: a second time would undo what the user has registered since for one of these model types
def register() -> None:
    """Register every architecture that hf_dms comes with."""
    from ..archs.registry import SPECS

    for spec in SPECS:
        register_arch(spec)


def register_arch(spec: ArchSpec) -> None:
    """Add support for an architecture: register its description and its per-layer config class.

    The per-layer model classes register themselves when the first such config is made.

    Args:
        spec: its description. transformers' Auto classes must know its config class and its model classes.

    Raises:
        ValueError: AutoConfig does not know the model type, or the description is inconsistent (`check_spec`).
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    from ..archs.registry import ARCHS
    from ..archs.spec import check_spec
    from ..archs.stages import in_stages
    from .modeling_dms import dms_config_class

    # With two stages, because lines that mention the stage before (`s-1`) begin with the second.
    for variant in spec.every_variant():
        check_spec(in_stages(variant, 2))
    if spec.model_type not in CONFIG_MAPPING:
        raise HfDmsError(
            f"AutoConfig does not know model type '{spec.model_type}'. "
            f"Call AutoConfig.register('{spec.model_type}', YourConfig) first."
        )
    stock: Any = CONFIG_MAPPING[spec.model_type]
    config_class = dms_config_class(stock)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    ARCHS[spec.model_type] = spec
