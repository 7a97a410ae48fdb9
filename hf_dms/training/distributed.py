"""Several processes: checks of a launch, gates outside DDP and FSDP, and work for the main process only.

Every process holds all gates. DDP and FSDP ignore them: `average_over_processes_` averages their gradients and Taylor
terms, with one collective operation per step. accelerate and the Trainer do the rest.
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
from ..archs.skeleton import attention_of, config_as_tied
from ..errors import HfDmsError
from ..gates import Gates
from ..gating.attach import copy_search_, gates_of, has_gates


class MainProcessError(HfDmsError):
    """Raised in the other processes when the main process fails. Only the main process prints its error."""


# ---- launches --------------------------------------------------------------------------------------------------------
def check_launch(arguments: TrainingArguments) -> None:
    """Check that the processes of a launch will work together, in a way that a search supports.

    Raises:
        ValueError: the processes would run independently; FSDP was asked for and would not be used; or the launch uses
            DeepSpeed ZeRO-3.
    """
    # Reading `device` makes the process group and sets `distributed_state`.
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
        ValueError: the launch uses FSDP 1, or a kind of loading that would empty the gates, or the model has adapters
            or packed weights.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if base_model_of(model) is not model or any(map(is_packed, model.modules())):
        raise HfDmsError(
            "FSDP with adapters or packed weights is not supported: no process holds whole weights to merge. Use DDP "
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
    """Tell DDP and FSDP, before they wrap a model, to ignore its gates, in place.

    DDP expects one gradient from each forward pass. Ratios have none in the warm-up, and get one from the resource loss
    outside the forward pass, so DDP would wait for it or count it twice. FSDP would shard the ratios.
    """
    mine = {id(tensor) for tensor in (*gates.parameters(), *gates.buffers())}
    named = (*model.named_parameters(), *model.named_buffers())
    # By identity, because the wrapped model names them with a prefix (PEFT, the base model's).
    names = [name for name, tensor in named if id(tensor) in mine]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.ignored_modules = [gates]


@contextlib.contextmanager
def without_ddp_for_frozen(model: nn.Module, gates: Gates, accelerator: Accelerator) -> Iterator[None]:
    """Context: accelerate prepares a model without DDP if only the gates train: DDP needs a trainable parameter."""
    ddp = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if ddp and not any(p.requires_grad for p in model.parameters() if p is not gates.prune_ratio):
        # A model in evaluation mode is moved to its device and not wrapped.
        prepare = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.prepare_model = prepare
    try:
        yield
    finally:
        accelerator.__dict__.pop("prepare_model", None)


def average_over_processes_(tensors: list[Tensor], accelerator: Accelerator) -> None:
    """Average tensors over processes, in place, with one collective operation."""
    # One message for all dims: the tensors are small, and each collective has a fixed cost.
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    flat = accelerator.reduce(flat, reduction="mean")
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.detach().copy_(mean.view_as(tensor))


# ---- whole models ----------------------------------------------------------------------------------------------------
def unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or if FSDP2 has sharded it a whole copy, with gates, on the CPU of each process.

    Every process must call it.
    """
    if not isinstance(model, FSDPModule):
        return model
    original: Any = type(model).__bases__[1]  # fully_shard has replaced the class by one derived from it
    config = config_as_tied(model)
    found = original._from_config(config, dtype=config.dtype, attn_implementation=attention_of(model))
    # `full_tensor` is a collective operation, so all processes must gather in the same order.
    state = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in
             model.state_dict().items()}  # fmt: skip
    found.load_state_dict(state)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if has_gates(model):
        copy_search_(model, found)
        # The copy's gates have frozen nothing themselves, and `detach_` thaws what their list names.
        gates_of(found).attachment.frozen.extend(gates_of(model).attachment.frozen)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(trains[name])
    return found.train(model.training)


def unshard_(model: PreTrainedModel, device: torch.device) -> None:
    """Undo FSDP2's sharding, in place. Every process must call it; a trainer of the model cannot continue."""
    if isinstance(model, FSDPModule):
        found: Any = unsharded(model)
        found.to(device)
        # The caller's object becomes the plain model, so that everyone who holds it sees that.
        model.__class__, model.__dict__ = found.__class__, found.__dict__


# ---- what only the main process does ---------------------------------------------------------------------------------
def run_on_main(function: Callable[[], Any]) -> Any:
    """Run a function in the main process only. The other processes wait for its result.

    Returns:
        The result, in every process.

    Raises:
        MainProcessError: in the other processes, if the function raises.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    # Result and error are sent together, so that an error cannot leave the other processes waiting.
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
    """End the process group, once all processes are done. A process that left earlier would make the others fail."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
