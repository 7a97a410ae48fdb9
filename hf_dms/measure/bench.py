"""`hf-dms bench PATH [--baseline DENSE]`: how fast a saved model is, compared with what its multiply-accumulates
promise.

Both models run in turns in one process, after one turn that does not count. A speed ratio is the median of the ratios
of the turns, with their quartiles as spread. If a ratio is clearly below the promise, the run is profiled, and reasons
are given from the measurements. speed.py runs, times, counts and profiles; reasons.py explains.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..archs.bind import dim_size, for_config
from ..archs.inputs import max_tokens
from ..archs.registry import dense_spec
from ..errors import HfDmsError
from ..tasks.registry import task_of
from .reasons import ALIGNED_BYTES, Shape, falls_short, reasons
from .speed import Run, costs_of, in_turns, inputs_for, load_model, peak_bytes, profiled, run_with, timed, widths
from .versions import device_name, versions

PROFILES = 3  # profiled runs of each model, where a measurement falls short


def bench(
    path: str,
    baseline: str | None = None,
    batch_sizes: tuple[int, ...] = (1, 32),
    sequence_length: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Measure a saved model, and compare it with another one if given.

    Args:
        path: folder or Hub id of a model of any layout.
        baseline: another model of the same task, such as the dense one.
        batch_sizes: sequences or images at a time.
        sequence_length: tokens per sequence, the prompt; unused for images.
        new_tokens: tokens that a causal language model decodes after the prompt.
        repeats: timed runs of each model.
        dtype: auto (as saved), float32, float16 or bfloat16.
        device: cpu, cuda, ...; default: an accelerator if there is one.

    Returns:
        `machine`, the options, `models` (the baseline first) with `path`, `num_params`, `load_seconds` and
        `peak_bytes`, and `measurements`, one for each phase and batch size: `per_second` and `macs` of each model and,
        with a baseline, `ratio`, `promised` and `reasons`. Times, speeds and ratios are `[quartile, median, quartile]`.

    Raises:
        ValueError: an option is out of range, the models have different tasks, or sequences are too long for a model.
    """
    device = device or (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    paths = [each for each in (baseline, path) if each is not None]
    _check_options(batch_sizes, sequence_length, new_tokens, repeats, device)
    task, configs = _same_task(paths)
    if not task.generates:
        new_tokens = 0
    if task.processor_class != "AutoImageProcessor":
        _check_lengths(paths, configs, sequence_length + new_tokens)
    how = (task.model_class, dtype, device)
    runs = [Run(batch_size, sequence_length, new_tokens) for batch_size in batch_sizes]
    models: list[dict[str, Any]] = [
        # Peak memory first: its processes need the room that the loaded models will take here.
        {"path": each, "peak_bytes": {str(run.batch_size): peak_bytes(each, *how, run) for run in runs}}
        for each in paths
    ]
    loads = in_turns(lambda each: {"load": timed(lambda: load_model(each, *how))[1]}, paths, repeats)
    # Both stay in memory, so that they can run in turns.
    loaded = [load_model(each, *how) for each in paths]
    for entry, model, times in zip(models, loaded, loads):
        entry |= {"num_params": model.num_parameters(), "load_seconds": quartiles(times["load"])}
    result = {"machine": machine(device, loaded[-1].dtype), "task": task.name, "repeats": repeats}
    result |= {"sequence_length": sequence_length, "new_tokens": new_tokens, "unit": task.speed[1], "models": models}
    result["measurements"] = [row for run in runs for row in measure(loaded, configs, task.model_class, run, repeats)]
    if baseline is not None:
        explain_(result["measurements"], loaded, runs)
    return result


def _check_options(batch_sizes: tuple[int, ...], sequence_length: int, new_tokens: int, repeats: int, device: str):
    values = {"--sequence-length": sequence_length, "--repeats": repeats}
    for name, value in [*values.items(), *(("--batch-sizes", size) for size in batch_sizes)]:
        if value < 1:
            raise HfDmsError(f"{name} must be at least 1, got {value}.")
    if new_tokens < 0:
        raise HfDmsError(f"--new-tokens must be at least 0 (0 measures no decoding), got {new_tokens}.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise HfDmsError(f"--device {device} cannot be used here: {reason}. Leave it out, or give cpu.") from error


def _same_task(paths: list[str]) -> tuple[Any, list[Any]]:
    found = [task_of(each) for each in paths]
    tasks = [task.name for task, _ in found]
    if tasks[0] != tasks[-1]:
        raise HfDmsError(
            f"--baseline {paths[0]} is a model for {tasks[0]}, {paths[1]} one for {tasks[1]}. Their speeds cannot be "
            "compared; give the dense model that the other was cut from."
        )
    return found[0][0], [config for _, config in found]


def _check_lengths(paths: list[str], configs: list[Any], tokens: int) -> None:
    for path, config in zip(paths, configs):
        longest = max_tokens(config)
        if longest is not None and tokens > longest:
            raise HfDmsError(
                f"{path} takes at most {longest} tokens, got {tokens}. Give a smaller --sequence-length, or fewer "
                "--new-tokens."
            )


# ---- measuring -------------------------------------------------------------------------------------------------------
def measure(loaded: list[Any], configs: list[Any], auto: str, run: Run, repeats: int) -> list[dict[str, Any]]:
    """Time and count the phases of a run of one or two models (the baseline first).

    Returns:
        A measurement for each phase, as `bench` returns it, without reasons.
    """
    # One input for both: no cut changes the vocabulary or the size of images.
    inputs = inputs_for(loaded[0], run)
    times = in_turns(lambda model: run_with(timed, model, inputs, run.new_tokens), loaded, repeats)
    costs = [costs_of(config, auto, model.dtype, run) for config, model in zip(configs, loaded)]
    rows = []
    for phase in times[0]:
        amount = run.batch_size * (run.new_tokens if phase == "decode" else _units(loaded[0], run))
        row: dict[str, Any] = {"phase": phase, "batch_size": run.batch_size}
        row["per_second"] = [quartiles([amount / each for each in found[phase]]) for found in times]
        row["seconds"] = [quartiles(found[phase]) for found in times]
        row |= {name: [cost[phase][name] for cost in costs] for name in costs[0][phase]}
        if len(loaded) == 2:
            # Ratios within a turn: a machine that slows down slows both models, and their ratio stays.
            row["ratio"] = quartiles([dense / cut for dense, cut in zip(times[0][phase], times[1][phase])])
            row["promised"] = row["macs"][0] / row["macs"][1]
        rows.append(row)
    return rows


def _units(model: Any, run: Run) -> int:
    """Units that are counted in a prefill, per item of a batch: the tokens of a prompt, or 1 for the item itself."""
    return run.sequence_length if model.can_generate() else 1


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


def machine(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and versions that the numbers hold for."""
    busy = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "device": device,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "load_average": busy,
        "versions": versions(),
    }


# ---- explaining ------------------------------------------------------------------------------------------------------
def explain_(measurements: list[dict[str, Any]], loaded: list[Any], runs: list[Run]) -> None:
    """Give every measurement its `reasons`, in place, and a `profile` where one of its run falls short."""
    shapes = [shape_of(model) for model in loaded]
    for run in runs:
        rows = {row["phase"]: row for row in measurements if row["batch_size"] == run.batch_size}
        for row in rows.values():
            row["reasons"] = []
        if not any(map(falls_short, rows.values())):
            continue
        for phase, profile in _profiles(loaded, run).items():
            rows[phase]["profile"] = profile
        for row in filter(falls_short, rows.values()):
            row["reasons"] = reasons(row, rows["prefill"], *shapes)


def _profiles(loaded: list[Any], run: Run) -> dict[str, list[dict[str, float]]]:
    """Per phase of a run the seconds of each model by kind of operator."""
    inputs = inputs_for(loaded[0], run)
    found = in_turns(lambda model: run_with(profiled, model, inputs, run.new_tokens), loaded, PROFILES)
    return {phase: [_medians(profiles[phase]) for profiles in found] for phase in found[0]}


def _medians(profiles: list[dict[str, float]]) -> dict[str, float]:
    return {kind: quartiles([profile[kind] for profile in profiles])[1] for kind in profiles[0]}


def shape_of(model: Any) -> Shape:
    """The parts of a model's shape that a reason may mention."""
    multiple = ALIGNED_BYTES.get(model.device.type, 64) // model.dtype.itemsize
    spec = for_config(dense_spec(model.config.model_type), model.config)
    num_layers = sum(dim_size(spec.dim(stack), model.config) for stack in spec.stacks)
    return Shape(num_layers, widths(model), multiple)


def bench_table(result: dict[str, Any]) -> str:
    """The result of `bench` as a Markdown table, with a line for each warning."""
    compared = len(result["models"]) == 2
    names = [Path(entry["path"]).name or entry["path"] for entry in result["models"]]
    header = ["", *names, *(["times as fast", "MACs promise"] if compared else [])]
    lines = [_line(header), "|---" * len(header) + "|"]
    for row in result["measurements"]:
        cells = [f"{_unit(result, row)}, batch {row['batch_size']}", *map(_spread, row["per_second"])]
        lines.append(_line([*cells, _spread(row["ratio"]), f"{row['promised']:.2f}"] if compared else cells))
    for size in result["models"][0]["peak_bytes"]:
        peaks = [entry["peak_bytes"][size] for entry in result["models"]]
        cells = ["not known" if peak is None else f"{peak / 2**20:,.0f} MiB" for peak in peaks]
        lines.append(_line([f"peak memory, batch {size}", *cells, *(["", ""] if compared else [])]))
    loads = [f"{_spread(entry['load_seconds'])} s" for entry in result["models"]]
    lines.append(_line(["load", *loads, *(["", ""] if compared else [])]))
    return "\n".join([*lines, "", _conditions(result), *_warnings(result)])


def _line(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _unit(result: dict[str, Any], row: dict[str, Any]) -> str:
    return "decode tokens/s" if row["phase"] == "decode" else result["unit"]


def _spread(values: list[float]) -> str:
    """Median (lower quartile to upper quartile)."""
    low, median, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{median} ({low} to {high})"


def _conditions(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['name']}, {machine['threads']} threads, {machine['dtype']}, load average {machine['load_average']}; "
        f"median (quartiles) of {result['repeats']} runs in turns; {result['sequence_length']} tokens, "
        f"{result['new_tokens']} new ones; torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}"
    )


def _warnings(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["measurements"] if row.get("reasons")]
    return [
        f"warning: {row['phase']} at batch {row['batch_size']} is {row['ratio'][1]:.2f} times as fast, MACs promise "
        f"{row['promised']:.2f}: {'. '.join(row['reasons'])}."
        for row in rows
    ]
