"""Several processes: which launches are refused, how gates stay out of DDP and FSDP, what only the main process does.

Every process holds all gates. DDP and FSDP know nothing of them: their gradients and Taylor terms are averaged by
`average_over_processes_`, one collective per step. The rest is accelerate's and the Trainer's.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainingArguments

from ..archs.plain_view import base_model_of, is_packed
from ..archs.skeleton import config_as_tied
from ..errors import HfDmsError
from ..gates import Gates
from ..gating.attach import copy_search_, gates_of, has_gates


class MainProcessError(HfDmsError):
    """Raised in the other processes for an error that the main process met, and tells."""


# ---- launches --------------------------------------------------------------------------------------------------------
def check_launch(arguments: TrainingArguments) -> None:
    """Check that the processes of a launch will work together, and in a way that a search can use.

    Raises:
        ValueError: they would be independent runs; FSDP was asked for and would not be used; DeepSpeed ZeRO-3.
    """
    kind = arguments.distributed_state.distributed_type if arguments.device is not None else None
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if kind == DistributedType.NO and num_processes > 1:
        raise HfDmsError(
            f"WORLD_SIZE is {num_processes}, but the processes would run independently of each other and write to the "
            "same place: there is no GPU, and accelerate joins CPU processes only with train.use_cpu: true "
            "(use_cpu=True of TrainingArguments)."
        )
    if _fsdp_is_asked_for() and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise HfDmsError(
            f"FSDP was asked for (ACCELERATE_USE_FSDP=true), but accelerate would run {kind.value} instead: it has "
            "FSDP on accelerators only, for more than one process. Use recipes/accelerate/ddp.yaml here."
        )
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise HfDmsError(
            "DeepSpeed ZeRO-3 is not supported: it leaves no whole parameter in any process, and masks, counts and the "
            "cut need them. Use zero_stage: 2 (recipes/accelerate/zero2.yaml), or FSDP2, which shards parameters too."
        )


def check_plugin(accelerator: Accelerator, model: nn.Module) -> None:
    """Check the options of accelerate's FSDP.

    Raises:
        ValueError: FSDP 1, loading that would empty the gates, or a model with adapters or packed weights.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if base_model_of(model) is not model or any(map(is_packed, model.modules())):
        raise HfDmsError(
            "FSDP with adapters or packed weights is not supported: no process holds what is to be merged. Use DDP "
            "(recipes/accelerate/ddp.yaml): with LoRA, gradients and optimizer state are small."
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise HfDmsError(
            f"fsdp_version must be 2, got {plugin.fsdp_version}: FSDP 1 flattens parameters of one dtype into one "
            "vector, and the gates are float32 whatever the model is. See recipes/accelerate/fsdp2.yaml."
        )
    if plugin.cpu_ram_efficient_loading:
        raise HfDmsError(
            "fsdp_cpu_ram_efficient_loading must be false: it moves the model, gates and all, to the meta device and "
            "loads only the weights again. See recipes/accelerate/fsdp2.yaml."
        )


def _fsdp_is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


# ---- gates in every process ------------------------------------------------------------------------------------------
def leave_gates_out_(model: nn.Module, gates: Gates, accelerator: Accelerator) -> None:
    """Tell DDP and FSDP, before they wrap a model, to leave its gates alone, in place.

    DDP would otherwise wait for, or count twice, the gradient of ratios that take no part in the forward pass (warm-up)
    and get one from the resource loss outside of it; FSDP would shard them.
    """
    mine = {id(tensor) for tensor in (*gates.parameters(), *gates.buffers())}
    named = (*model.named_parameters(), *model.named_buffers())
    names = [name for name, tensor in named if id(tensor) in mine]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.ignored_modules = [gates]


@contextlib.contextmanager
def without_ddp_for_frozen(model: nn.Module, gates: Gates, accelerator: Accelerator) -> Iterator[None]:
    """Let accelerate prepare a model without DDP where the gates alone train: DDP needs a parameter of its own."""
    ddp = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if ddp and not any(p.requires_grad for p in model.parameters() if p is not gates.prune_ratio):
        prepare = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.prepare_model = prepare
    try:
        yield
    finally:
        accelerator.__dict__.pop("prepare_model", None)


def average_over_processes_(tensors: list[Tensor], accelerator: Accelerator) -> None:
    """Average tensors over processes, in place and in one collective."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    flat = accelerator.reduce(flat, reduction="mean")
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.detach().copy_(mean.view_as(tensor))


# ---- whole models ----------------------------------------------------------------------------------------------------
def unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """A model that FSDP2 has not sharded: the model itself, or a copy on the CPU of each process, gates included.

    Every process must call it.
    """
    if not isinstance(model, FSDPModule):
        return model
    original: Any = type(model).__bases__[1]  # fully_shard derives a class from it
    config = config_as_tied(model)
    found = original._from_config(config, dtype=config.dtype, attn_implementation=config._attn_implementation)
    state = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in
             model.state_dict().items()}  # fmt: skip
    found.load_state_dict(state)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if has_gates(model):
        copy_search_(model, found)
        gates_of(found).attachment.frozen.extend(gates_of(model).attachment.frozen)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(trains[name])
    return found.train(model.training)


def unshard_(model: PreTrainedModel, device: torch.device) -> None:
    """Undo FSDP2's sharding, in place; a trainer of the model cannot go on. Every process must call it."""
    if isinstance(model, FSDPModule):
        found: Any = unsharded(model)
        found.to(device)
        model.__class__, model.__dict__ = found.__class__, found.__dict__


# ---- what only the main process does ---------------------------------------------------------------------------------
def run_on_main(function: Callable[[], Any]) -> Any:
    """Run a function in the main process alone; the others wait for what it returns.

    Returns:
        Its result, in every process.

    Raises:
        MainProcessError: in the other processes, for whatever the main one raises.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    outcome: list[Any] = [None, None]
    error = None
    if state.is_main_process:
        try:
            outcome[0] = function()
        except Exception as raised:
            error, outcome[1] = raised, str(raised) or type(raised).__name__
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise MainProcessError(outcome[1])
    return outcome[0]


def is_main() -> bool:
    """Whether this is the main process, or the only one."""
    return PartialState().is_main_process


def print_on_main(text: str) -> None:
    """Print in the main process."""
    if is_main():
        print(text, flush=True)


def end_processes() -> None:
    """Take the processes apart, once all have come to their end; one that leaves earlier would take others with it."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
