"""Work that `test_distributed.py` starts in several processes: `accelerate launch ... processes.py FOLDER WHAT...`.

Each process leaves its results in FOLDER/WHAT-RANK.safetensors.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from helpers.tiny import Tokens, tiny_llama
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer
from hf_dms.training.distributed import MainProcessError, end_processes, run_on_main, unshard_

GLOBAL_BATCH = 8


def searching(
    folder: Path, pipeline: str, callbacks=(), model=None, kl_weight=0.0, scales=False, **options
) -> DMSTrainer:
    """A trainer of a short search, in two micro-batches per step and process.

    The default is SGD: Adam's first steps are signs, which turn a rounding error of a small gradient into a whole step.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    defaults = dict(
        max_steps=6, optim="sgd", learning_rate=0.05, per_device_train_batch_size=GLOBAL_BATCH // processes // 2,
        gradient_accumulation_steps=2, logging_steps=1, seed=3, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, eval_strategy="steps", eval_steps=3, save_steps=3, logging_nan_inf_filter=False,
    )  # fmt: skip
    config = DMSConfig(
        target=0.6, layout="per_layer", warmup_steps=2, gate_learning_rate=0.02, target_ramp=0.5, pipeline=pipeline,
        kl_weight=kl_weight, scales=scales,
    )  # fmt: skip
    return DMSTrainer(
        model=tiny_llama() if model is None else model,
        args=TrainingArguments(str(folder), **(defaults | options)),
        dms_config=config,
        train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=1),
        callbacks=list(callbacks),
    )


def results(trainer: DMSTrainer) -> dict[str, Tensor]:
    """The results that must not depend on the number of processes: the search, its logs, and the cut model."""
    logs = {}
    for key in ("loss", "task_loss", "resource", "grad_norm", "eval_loss"):
        logs[f"log/{key}"] = torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])
    weights = {f"pruned/{name}": tensor.clone() for name, tensor in trainer.prune().state_dict().items()}
    return trainer.gates.search_state() | logs | weights


def ddp(folder: Path, pipeline: str) -> dict[str, Tensor]:
    trainer = searching(folder / f"ddp{pipeline}", pipeline)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (pipeline == "p")
    return results(trainer)


def ddp_kl(folder: Path, pipeline: str) -> dict[str, Tensor]:
    """A search with the dense model as teacher, and with scales of units."""
    trainer = searching(folder / f"ddp_kl{pipeline}", pipeline, kl_weight=1.0, scales="norms")
    trainer.train()
    return results(trainer)


def fsdp_kl(folder: Path, pipeline: str) -> dict[str, Tensor]:
    _pretend_fsdp()
    trainer = searching(folder / f"fsdp_kl{pipeline}", pipeline, kl_weight=1.0, scales="norms")
    trainer.train()
    return results(trainer)


def fsdp(folder: Path, pipeline: str) -> dict[str, Tensor]:
    """Make accelerate use its FSDP2 on CPU processes. It can, but does so on accelerators only."""
    _pretend_fsdp()
    trainer = searching(folder / f"fsdp{pipeline}", pipeline)
    trainer.train()
    sharded = [isinstance(p, DTensor) for p in trainer.model.parameters() if p is not trainer.gates.prune_ratio]
    assert all(sharded)
    assert type(trainer.gates.prune_ratio) is torch.nn.Parameter
    found = results(trainer)
    unshard_(trainer.model, torch.device("cpu"))
    assert not isinstance(trainer.model, FSDPModule)
    with torch.no_grad():
        assert trainer.model(**Tokens()[0:2]).loss.isfinite()
    return found


def resume(folder: Path, pipeline: str) -> dict[str, Tensor]:
    """FSDP2 again, resumed half way. With Adam, because torch cannot load an optimizer without state."""
    _pretend_fsdp()
    found = []
    for seed, checkpoint in ((0, None), (5, str(folder / "resumed/checkpoint-3"))):
        trainer = searching(folder / "resumed", pipeline, model=tiny_llama(seed=seed), optim="adamw_torch")
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(results(trainer))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    return found[0]


def _pretend_fsdp() -> None:
    AcceleratorState.distributed_type = property(lambda state: DistributedType.FSDP, lambda state, value: None)
    AcceleratorState.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


def main_only(folder: Path, pipeline: str) -> dict[str, Tensor]:
    """What `run_on_main` returns and raises in each process."""
    rank = PartialState().process_index

    def refuse():
        raise ValueError("the folder is full")

    assert run_on_main(lambda: f"from {rank}") == "from 0"
    with pytest.raises(MainProcessError if rank else ValueError, match="the folder is full"):
        run_on_main(refuse)
    return {"rank": torch.tensor(rank)}


class PoisonInOne(TrainerCallback):
    """Make the loss NaN in one step of one process."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            self.hook = model.register_forward_hook(self.poison)

    def poison(self, module, args, output):
        output.loss = output.loss * float("nan")
        return output

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 4:
            self.hook.remove()


def poison(folder: Path, pipeline: str) -> dict[str, Tensor]:
    """A step that is bad in one process is skipped in both."""
    trainer = searching(folder / "poison", pipeline, callbacks=[PoisonInOne()])
    trainer.train()
    assert trainer.skipped_steps == 1
    assert trainer.gates.num_updates == 5
    return trainer.gates.search_state()


class FailInOne(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            raise RuntimeError("process 1 has had enough")


def error(folder: Path, pipeline: str) -> None:
    searching(folder / "error", pipeline, callbacks=[FailInOne()]).train()


if __name__ == "__main__":
    for what in sys.argv[2:]:
        kind, _, pipeline = what.partition(":")
        found = globals()[kind](Path(sys.argv[1]), pipeline)
        tensors = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(tensors, Path(sys.argv[1]) / f"{what}-{PartialState().process_index}.safetensors")
    end_processes()
