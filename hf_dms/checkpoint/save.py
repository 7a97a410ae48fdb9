"""Checkpoints: the state of a search beside a training checkpoint, and the pruned model with a proof that it reloads.

`save_pruned` writes into a temporary folder beside the target, reloads it, compares outputs, and only then renames it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..cut.verify import check_same, dummy_inputs
from ..errors import HfDmsError
from ..gates import Gates
from ..gating.attach import gates_of

STATE_TENSORS = "dms_state.safetensors"
STATE_JSON = "dms_state.json"


def save_search_state(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write the state of a search (prune ratios, importance) beside a training checkpoint's model files.

    Args:
        model: a model with gates.
        folder: an existing checkpoint folder.
    """
    gates = gates_of(model)
    folder = Path(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in gates.search_state().items()}
    save_file(tensors, folder / STATE_TENSORS)
    summary = {
        "dms_config": gates.attachment.config.to_dict(),
        "resource": float(gates.resource().detach()),
        "hard_resource": float(gates.resource(gates.hard_sizes())),
        "kept_units": kept_units(gates),
    }
    (folder / STATE_JSON).write_text(json.dumps(summary, indent=2) + "\n")


def load_search_state_(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Read what `save_search_state` wrote into the gates of a model, in place.

    Raises:
        ValueError: the folder has no such state, or that of another search.
    """
    path = Path(folder) / STATE_TENSORS
    if not path.is_file():
        raise HfDmsError(f"{folder} has no {STATE_TENSORS}: it is not a checkpoint of a DMS search.")
    gates_of(model).load_search_state_(load_file(path))


def load_weights_(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Read the weights of a training checkpoint, in place, whatever names the architecture's files give them.

    `Trainer` compares the names in a checkpoint with those in the model and passes over those that differ with a
    warning. Files of some architectures (ViT) hold other names than the model; `from_pretrained` renames them.

    Args:
        model: the model in training.
        folder: a checkpoint that `save_pretrained` wrote.
    """
    loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


def has_other_names(model: PreTrainedModel, folder: str | os.PathLike) -> bool:
    """Whether a folder's safetensors files hold parameters under names that the model itself does not have."""
    names: set[str] = set()
    for file in Path(folder).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return not names <= set(model.state_dict())


def kept_units(gates: Gates) -> dict[str, list[int]]:
    """Units that hard masks keep now, per dim and row."""
    return {name: gates.hard_units(name).tolist() for name in gates.dims}


def save_pruned(
    pruned: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    processor: Any = None,
    inputs: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> float:
    """Save a pruned model, proving that the folder reloads to the same model.

    Args:
        pruned: what `prune` returned.
        folder: where to; it must not exist, or be empty, unless `overwrite`.
        processor: tokenizer or image processor to save with it.
        inputs: keyword arguments of one forward pass for the comparison. Default: transformers' dummy inputs.
        files: further text files, name → content.
        overwrite: replace an existing folder, which stays as it is until the new one is complete.

    Returns:
        The largest relative difference of outputs after reloading.

    Raises:
        ValueError: the folder is not empty.
        VerificationError: the reloaded model differs; nothing is left behind.
    """
    with new_folder(folder, overwrite) as temporary:
        pruned.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        reloaded: Any = type(pruned).from_pretrained(temporary, dtype=pruned.dtype)
        reloaded.to(pruned.device)
        reloaded.set_attn_implementation(pruned.config._attn_implementation)
        return check_same(pruned, reloaded, inputs if inputs is not None else dummy_inputs(pruned), ("cut", "reloaded"))


@contextmanager
def new_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and is gone when it does not.

    Raises:
        ValueError: `folder` exists and is not an empty folder, and `overwrite` is not set.
    """
    target = Path(folder)
    check_writable(target, overwrite)
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(folder: Path, new: Path | None = None) -> None:
    """Remove a folder, if it is there, and give its name to another one: a kill leaves no part of it under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # what an earlier kill left
    if folder.exists():
        folder.rename(removed)
    if new is not None:
        new.rename(folder)
    shutil.rmtree(removed, ignore_errors=True)


def check_writable(folder: str | os.PathLike, overwrite: bool) -> None:
    """Check that a result may be written to a folder.

    Raises:
        ValueError: it exists and is not an empty folder, and `overwrite` is not set.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise HfDmsError(f"{target} exists and is not empty. Choose another output.path or set output.overwrite: true.")
