"""The versions that a result was made with."""

from __future__ import annotations

import platform

import accelerate
import datasets
import torch
import transformers

from .. import __version__


def versions() -> dict[str, str]:
    """Versions of hf_dms, of Python and of the packages that a result depends on most."""
    modules = (torch, transformers, accelerate, datasets)  # torch's own word says more than its metadata: 2.13.0+cpu
    named = {module.__name__: str(module.__version__) for module in modules}
    return {"hf_dms": __version__, "python": platform.python_version()} | named
