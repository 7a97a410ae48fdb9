"""The versions and the device that a result was made with."""

from __future__ import annotations

import platform
from pathlib import Path

import accelerate
import datasets
import torch
import transformers

from .. import __version__


def versions() -> dict[str, str]:
    """Versions of hf_dms, of Python and of the packages that a result depends on most."""
    modules = (torch, transformers, accelerate, datasets)  # torch.__version__ has the build too: 2.13.0+cpu
    named = {module.__name__: str(module.__version__) for module in modules}
    return {"hf_dms": __version__, "python": platform.python_version()} | named


def device_name(device: torch.device | str) -> str:
    """Name of a CUDA device, or of the processor for the CPU; the type of any other device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
