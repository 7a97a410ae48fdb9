"""Time and cost of running a model: the measurements behind `bench.py`.

A run is a prefill (one forward pass), and for a language model the decoding of new tokens after it, with a cache. A
language model computes the logits of the last position only, as in generation. The logits of all positions would hide
the effect of a cut, because no cut makes the output embedding smaller in rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..archs.inputs import num_token_ids
from ..archs.skeleton import without_values
from ..cut.register import register
from ..cut.verify import dummy_inputs
from ..errors import HfDmsError
from ..files import load_saved

Subject = TypeVar("Subject")
Work = Callable[[], Any]
# Operators of aten that do the work. Those that call them (linear, matmul, conv2d) take almost no time themselves.
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "mkldnn_convolution", "cudnn_convolution")


@dataclass(frozen=True)
class Run:
    """The shape of a run.

    Attributes:
        batch_size: sequences or images.
        sequence_length: tokens of each sequence, the prompt; unused for images.
        new_tokens: tokens decoded after the prompt; 0 for classifiers.
    """

    batch_size: int
    sequence_length: int
    new_tokens: int = 0


# ---- running ---------------------------------------------------------------------------------------------------------
def load_model(path: str, auto: str, dtype: str, device: str) -> PreTrainedModel:
    """A saved model, ready to run.

    Args:
        path: folder or Hub id.
        auto: name of the Auto class.
        dtype: auto (as saved) or a name.
        device: where to.
    """
    transformers.utils.logging.disable_progress_bar()
    return load_saved(getattr(transformers, auto), path, dtype=dtype).to(device).eval()


def inputs_for(model: PreTrainedModel, run: Run) -> dict[str, Tensor]:
    """Random inputs of the prefill; only their shapes matter for speed."""
    if model.main_input_name == "pixel_values":
        pixels = dummy_inputs(model)["pixel_values"][:1]
        return {"pixel_values": pixels.repeat(run.batch_size, 1, 1, 1)}
    known: Any = num_token_ids(model.config)
    shape, generator = (run.batch_size, run.sequence_length), torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(known, shape, generator=generator).to(model.device)}


@torch.no_grad()
def run_with(
    measure: Callable[[Work], tuple[Any, Any]],
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    new_tokens: int = 0,
) -> dict[str, Any]:
    """Run a model, each phase under a measure.

    Args:
        measure: function that runs the given work, and returns its result and the measurement.
        model: the model.
        inputs: keyword arguments of the prefill.
        new_tokens: tokens to decode after it; more than 0 needs a causal language model.

    Returns:
        The measurement of `prefill`, and of `decode` if there are new tokens.
    """
    options = {"logits_to_keep": 1, "use_cache": True} if model.can_generate() else {}
    output, measured = measure(lambda: model(**inputs, **options))
    result = {"prefill": measured}
    if new_tokens:
        result["decode"] = measure(lambda: _decode(model, output, options, new_tokens))[1]
    return result


def _decode(model: PreTrainedModel, output: Any, options: dict[str, Any], new_tokens: int) -> Any:
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, **options)
    return output


def timed(work: Work) -> tuple[Any, float]:
    """The output of a model, and the seconds that it took.

    It uses torch's clock, which waits for the device, but not torch's `Timer`. `Timer` runs the work at least twice
    before each measurement, drops its output (decoding needs it), and sets the number of threads.
    """
    start = timer()
    output = work()
    return output, timer() - start


def in_turns(measure: Callable[[Subject], Mapping[str, Any]], subjects: list[Subject], repeats: int) -> list[dict]:
    """Measure several things in turns, so that a noisy machine treats them alike.

    Args:
        measure: function that measures one subject, and returns measurements by name.
        subjects: models, or paths.
        repeats: measurements of each, after one that does not count.

    Returns:
        For each subject and name, a list of `repeats` measurements.
    """
    found: list[dict[str, list[Any]]] = [{} for _ in subjects]
    for turn in range(repeats + 1):
        for subject, measurements in zip(subjects, found):
            for name, measured in measure(subject).items():
                # The first turn pays for caches, allocations and the choice of kernels.
                if turn > 0:
                    measurements.setdefault(name, []).append(measured)
    return found


def seconds_per_batch(models: list[PreTrainedModel], inputs: Mapping[str, Tensor], repeats: int = 3) -> list[float]:
    """Median time of a forward pass of each model, measured in turns.

    Args:
        models: the models. A language model computes the logits of the last position only.
        inputs: keyword arguments of a forward pass; labels are ignored.
        repeats: timed passes of each, after one that is not timed.
    """

    def measure(model: PreTrainedModel) -> dict[str, float]:
        batch = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}
        return run_with(timed, model, batch)

    return [sorted(times["prefill"])[repeats // 2] for times in in_turns(measure, models, repeats)]


# ---- the cost of a run, from shapes ----------------------------------------------------------------------------------
def costs_of(config: Any, auto: str, dtype: torch.dtype, run: Run) -> dict[str, dict[str, float]]:
    """Multiply-accumulates and bytes of the phases of a run, of any layout, counted on the meta device.

    Args:
        config: the model's config.
        auto: name of its Auto class.
        dtype: precision that it runs in.
        run: shape of the run.

    Returns:
        Per phase `macs`: of all matrix products, convolutions and attention scores (over the full square). For decode
        also `bytes`: the weights of linear maps and the cache that its last step reads; and `head_macs`: the part of
        `macs` in the output embedding, whose rows no cut removes.
    """
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config, dtype=dtype, attn_implementation="eager").eval()
        inputs = {name: tensor.to("meta") for name, tensor in inputs_for(model, run).items()}
    outputs = []

    def counted(work: Work) -> tuple[Any, float]:
        # Under eager attention, because the counter knows others on some devices only.
        with without_values(), FlopCounterMode(display=False) as counter:
            outputs.append(work())
        # The counter takes a multiplication and an addition as two.
        return outputs[-1], counter.get_total_flops() / 2

    macs = run_with(counted, model, inputs, run.new_tokens)
    costs = {phase: {"macs": number} for phase, number in macs.items()}
    if run.new_tokens:
        # By identity: a tied output embedding is read once.
        weights = {id(m.weight): m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)}
        cached = outputs[0].past_key_values.layers
        costs["decode"]["bytes"] = sum(weights.values()) + sum(part.keys.nbytes + part.values.nbytes for part in cached)
        head = model.get_output_embeddings().weight.numel()
        costs["decode"]["head_macs"] = head * run.batch_size * run.new_tokens
    return costs


def widths(model: nn.Module) -> dict[int, set[str]]:
    """Every width of a linear map in the layers, and the names of the modules that have it."""
    found: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        # A number in the path: the module is in a list of layers.
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split(".")):
            for width in module.weight.shape:
                found.setdefault(width, set()).add(name.rpartition(".")[2])
    return found


# ---- where the time and the memory go --------------------------------------------------------------------------------
def profiled(work: Work) -> tuple[Any, dict[str, float]]:
    """The output of a model, and its seconds by kind of operator: `matmuls`, `attention`, `rest`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        output, _ = timed(work)
    seconds = {"matmuls": 0.0, "attention": 0.0, "rest": 0.0}
    on_device = output.logits.is_cuda
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel; its time is in its operator's time already
            continue
        name = event.key.removeprefix("aten::")
        kind = "matmuls" if name in MATMULS else "attention" if "attention" in name else "rest"
        seconds[kind] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
    return output, seconds


def peak_bytes(path: str, auto: str, dtype: str, device: str, run: Run) -> int | None:
    """Peak memory of loading a model and running it once, in a separate process.

    Returns:
        On a CPU, the peak resident memory of the process, including Python, libraries and mapped files. On CUDA, the
        peak of allocated memory there. None if the system does not report it.

    Raises:
        ValueError: the process failed, or the system ended it because memory ran out.
    """
    # Spawned, not forked: a fork would begin with all that this process holds, and CUDA does not survive one.
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load_and_run, args=(sender, path, auto, dtype, device, run))
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise HfDmsError(
            f"The process that loaded {path} and ran it at batch size {run.batch_size} ended with exit code "
            f"{process.exitcode}. Its error is above. If there is none, the system ended it, most likely because "
            "memory ran out. Give smaller --batch-sizes or a smaller --sequence-length."
        ) from None


def _load_and_run(sender: Connection, path: str, auto: str, dtype: str, device: str, run: Run) -> None:
    register()  # per-layer models
    model = load_model(path, auto, dtype, device)
    run_with(timed, model, inputs_for(model, run), run.new_tokens)
    on_cuda = model.device.type == "cuda"
    sender.send(torch.cuda.max_memory_allocated(device) if on_cuda else peak_resident_bytes())


def peak_resident_bytes() -> int | None:
    """The peak resident memory of this process so far, in bytes; None if the system does not report it."""
    status = Path("/proc/self/status")
    if status.is_file():  # better than ru_maxrss, which includes the peak of the parent process before exec
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith("VmHWM")
        )
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
