"""`save_pruned`: the pruned model on disk, checked by reloading it.

It writes into a temporary folder next to the target, reloads the model from there, compares outputs, and only then
renames the folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..archs.skeleton import attention_of
from ..cut.verify import check_same, dummy_inputs
from .folders import new_folder


def save_pruned(
    pruned: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    processor: Any = None,
    inputs: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> float:
    """Save a pruned model, and check that the folder reloads to the same model.

    Args:
        pruned: the model that `prune` returned.
        folder: the folder to write. Without `overwrite` it must be empty or not exist. It can never be the folder that
            the model, or the dense model, was loaded from.
        processor: tokenizer or image processor to save with it.
        inputs: keyword arguments of one forward pass for the comparison. Default: transformers' dummy inputs.
        files: further text files, name → content.
        overwrite: replace an existing folder. It stays unchanged until the new one is complete.

    Returns:
        The largest relative difference of outputs after reloading.

    Raises:
        ValueError: the folder is not empty, or is a folder that the model was loaded from.
        VerificationError: the reloaded model gives other outputs; the folder is not written.
    """
    with new_folder(folder, overwrite, filter(None, [pruned.name_or_path])) as temporary:
        pruned.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        # From disk, by the way a user loads it: what is compared is what was written, not what is in memory.
        reloaded: Any = type(pruned).from_pretrained(temporary, dtype=pruned.dtype)
        reloaded.to(pruned.device)
        # Attention kernels differ by rounding, and that is not the question here.
        reloaded.set_attn_implementation(attention_of(pruned))
        return check_same(pruned, reloaded, inputs if inputs is not None else dummy_inputs(pruned), ("cut", "reloaded"))
