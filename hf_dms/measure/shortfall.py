"""Why a cut is slower than its multiply-accumulates promise: reasons from what was measured, counted and profiled.

Nothing is guessed: where no part of a run falls short of the promise, that is what is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLEARLY = 0.85  # a ratio below this part of its promise falls short of it
SHARE = 0.1  # a part of a run that takes less of its time is not worth a word
HEAD_SHARE = 0.25  # of a cut model's MACs in the output embedding
# Rows of a matrix should begin at whole cache lines on a CPU; on CUDA, NVIDIA's guide to matrix multiplication asks for
# multiples of 128 bytes.
ALIGNED_BYTES = {"cpu": 64, "cuda": 128}
WORDS = {"attention": "attention", "rest": "the rest (norms, activations, copies, the calls themselves)"}


@dataclass(frozen=True)
class Shape:
    """What of a model's shape a reason may name.

    Attributes:
        num_layers: its layers.
        widths: every width of a linear map in them, and the modules that have it.
        multiple: what widths should be multiples of, by dtype and device.
    """

    num_layers: int
    widths: dict[int, set[str]]
    multiple: int


def falls_short(measurement: dict[str, Any]) -> bool:
    """Whether a cut is clearly slower than promised, or than the baseline: three quarters of its turns say so."""
    return measurement["ratio"][2] < max(1.0, CLEARLY * measurement["promised"])


def reasons(measurement: dict[str, Any], prefill: dict[str, Any], dense: Shape, cut: Shape) -> list[str]:
    """Why a measurement falls short.

    Args:
        measurement: one of `bench`, with its `profile`: seconds by kind of operator, of the baseline and of the cut.
        prefill: that of the prefill of the same run, with its profile (the same one for a prefill).
        dense: the baseline.
        cut: the model.
    """
    if measurement["promised"] <= 1:
        macs = " against ".join(f"{number:.3g}" for number in reversed(measurement["macs"]))
        return [f"it does no fewer MACs than the baseline ({macs})"]
    found = []
    memory_bound = measurement["phase"] == "decode" and _is_memory_bound(measurement, prefill)
    if memory_bound:
        found.append(_memory(measurement, prefill))
    if "head_macs" in measurement:
        shares = [head / macs for head, macs in zip(measurement["head_macs"], measurement["macs"])]
        if shares[1] >= HEAD_SHARE:
            found.append(
                f"the output embedding keeps its rows: {shares[1]:.0%} of its MACs are there, "
                f"{shares[0]:.0%} of the baseline's"
            )
    found += [] if memory_bound else _matmuls(measurement, dense, cut)
    found += _others(measurement, dense, cut)
    return found or ["no profiled part of the run falls short of the promise: was the machine busy? Measure again"]


def _is_memory_bound(measurement: dict[str, Any], prefill: dict[str, Any]) -> bool:
    """Whether multiplying takes most of the cut's time, at less than half the rate of a prefill."""
    seconds = measurement["profile"][1]
    return seconds["rest"] < sum(seconds.values()) / 2 and _rate(measurement) < _rate(prefill) / 2


def _rate(measurement: dict[str, Any]) -> float:
    """MACs per second of the cut while it multiplies."""
    seconds = measurement["profile"][1]
    return measurement["macs"][1] / (seconds["matmuls"] + seconds["attention"])


def _memory(measurement: dict[str, Any], prefill: dict[str, Any]) -> str:
    dense, cut = measurement["bytes"]
    return (
        f"memory bound: {_rate(measurement) / 1e9:.3g} GMAC/s, {_rate(prefill) / 1e9:.3g} when it prefills; each step "
        f"reads {cut / 1e6:.3g} MB of weights and cache, the baseline {dense / 1e6:.3g} MB, "
        f"{dense / cut:.2f} times as much"
    )


def _matmuls(measurement: dict[str, Any], dense: Shape, cut: Shape) -> list[str]:
    before, after = (seconds["matmuls"] for seconds in measurement["profile"])
    if before >= CLEARLY * measurement["promised"] * after:
        return []
    text = f"matrix multiplications are {before / after:.2f} times as fast"
    if odd := odd_widths(dense, cut):
        named = "; ".join(f"{width} of {', '.join(sorted(modules))}" for width, modules in odd.items())
        return [f"{text}; widths are no multiples of {cut.multiple}: {named}. Use round_to"]
    return [f"{text}, though no width became odd: narrower matrices use this hardware less well"]


def odd_widths(dense: Shape, cut: Shape) -> dict[int, set[str]]:
    """Widths of the cut that are no whole multiple, unless the same modules' were none in the baseline."""
    odd_before = {module for width, modules in dense.widths.items() if width % dense.multiple for module in modules}
    odd = {width: modules - odd_before for width, modules in sorted(cut.widths.items()) if width % cut.multiple}
    return {width: modules for width, modules in odd.items() if modules}


def _others(measurement: dict[str, Any], dense: Shape, cut: Shape) -> list[str]:
    """Parts whose work does not shrink with the widths."""
    before, after = measurement["profile"]
    found = []
    for kind, words in WORDS.items():
        share = after[kind] / sum(after.values())
        if share >= SHARE and before[kind] < CLEARLY * measurement["promised"] * after[kind]:
            text = f"{words} takes {share:.0%} of its time and is {before[kind] / after[kind]:.2f} times as fast"
            if kind == "rest" and cut.num_layers == dense.num_layers:
                text += f"; all {cut.num_layers} layers are kept, with as many calls as before"
            found.append(text)
    return found
