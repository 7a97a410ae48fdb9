"""The state of a search (prune ratios, importance), saved next to the model files of a training checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HfDmsError
from ..files import open_weights
from ..gates import Gates
from ..gating.attach import gates_of

STATE_TENSORS = "dms_state.safetensors"
STATE_JSON = "dms_state.json"
OPTIMIZER = "optimizer_"  # prefix of the names of the optimizer's tensors


def save_search_state(
    model: PreTrainedModel, folder: str | os.PathLike, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write the state of a search (prune ratios, importance) next to a training checkpoint's model files.

    Args:
        model: a model with gates.
        folder: an existing checkpoint folder.
        optimizer: the optimizer of the prune ratios and scales. Its state is written too.
    """
    gates = gates_of(model)
    folder = Path(folder)
    moments = {} if optimizer is None else optimizer.state_dict()["state"]
    state = gates.search_state()
    for number, tensors_of in moments.items():  # number 0 is the ratios, the others are scales
        state |= {f"{OPTIMIZER}{number}_{name}": tensor for name, tensor in tensors_of.items()}
    # safetensors refuses tensors that are not contiguous.
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / STATE_TENSORS)
    summary = {
        "dms_config": gates.attachment.config.to_dict(),
        "resource": float(gates.resource().detach()),
        "hard_resource": float(gates.resource(gates.hard_sizes())),
        "kept_units": hard_unit_counts(gates),
    }
    (folder / STATE_JSON).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def load_search_state_(
    model: PreTrainedModel, folder: str | os.PathLike, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Load a state that `save_search_state` wrote into the gates of a model and their optimizer, in place.

    Raises:
        ValueError: the folder has no such state, or the state of another search.
    """
    path = Path(folder) / STATE_TENSORS
    if not path.is_file():
        raise HfDmsError(f"{folder} has no {STATE_TENSORS}: it is not a checkpoint of a DMS search.")
    with open_weights(path) as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no dict)
    gates_of(model).load_search_state_(state)
    if optimizer is not None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith(OPTIMIZER):
                number, _, moment = name.removeprefix(OPTIMIZER).partition("_")
                moments.setdefault(int(number), {})[moment] = tensor
        # Learning rates are not restored: the trainer sets them before every step.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def load_weights_(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load the weights of a training checkpoint, in place, also if its files use other names than the model.

    `Trainer` compares the names in a checkpoint with those in the model, and skips unknown names with a warning. Files
    of some architectures (ViT) hold other names than the model; only `from_pretrained` renames them.

    Args:
        model: the model in training.
        folder: a checkpoint written by `save_pretrained`.
    """
    loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


def has_other_names(model: PreTrainedModel, folder: str | os.PathLike) -> bool:
    """Whether a folder's safetensors files hold parameters under names that the model itself does not have."""
    # Only headers are read.
    names: set[str] = set()
    for file in Path(folder).glob("model*.safetensors"):
        with open_weights(file) as tensors:
            names |= set(tensors.keys())
    return not names <= set(model.state_dict())


def hard_unit_counts(gates: Gates) -> dict[str, list[int]]:
    """Units that hard masks keep now, per dim and row."""
    return {name: gates.hard_units(name).tolist() for name in gates.dims}
