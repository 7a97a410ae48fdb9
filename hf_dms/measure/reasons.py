"""Why a cut model is slower than its multiply-accumulates promise, in words, from measurements, counts and profiles.

Nothing is guessed: if no part of a run is slower than promised, the text says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CLEARLY = 0.85  # a ratio below this part of its promise falls short of it
SHARE = 0.1  # parts of a run that take less than this share of its time are not mentioned
HEAD_SHARE = 0.25  # the output embedding is mentioned if it has at least this share of the cut model's MACs
# On a CPU, rows of a matrix should begin at cache lines (64 bytes). On CUDA, NVIDIA's guide to matrix multiplication
# asks for multiples of 128 bytes.
ALIGNED_BYTES = {"cpu": 64, "cuda": 128}
WORDS = {  # formatted with the result of `_facts`; pairs are (baseline, cut)
    "no_gain": "it does no fewer MACs than the baseline ({macs[1]:.3g} against {macs[0]:.3g})",
    "memory": "memory bound: {rate:.3g} GMAC/s, {prefill_rate:.3g} when it prefills; each step reads "
    "{megabytes[1]:.3g} MB of weights and cache, the baseline {megabytes[0]:.3g} MB, {read:.2f} times as much",
    "head": "the output embedding keeps its rows: {head[1]:.0%} of its MACs are there, {head[0]:.0%} of the baseline's",
    "odd": "matrix multiplications are {faster[matmuls]:.2f} times as fast; widths are no multiples of {multiple}: "
    "{odd}. Use round_to",
    "narrow": "matrix multiplications are {faster[matmuls]:.2f} times as fast, though no width became odd: narrower "
    "matrices use this hardware less well",
    "attention": "attention takes {share[attention]:.0%} of its time and is {faster[attention]:.2f} times as fast",
    "rest": "the rest (norms, activations, copies, the calls themselves) takes {share[rest]:.0%} of its time and is "
    "{faster[rest]:.2f} times as fast{layers}",
    "nothing": "no profiled part of the run falls short of the promise: was the machine busy? Measure again",
}


@dataclass(frozen=True)
class Shape:
    """The parts of a model's shape that a reason may mention.

    Attributes:
        num_layers: number of layers.
        widths: every width of a linear map in the layers, and the modules that have it.
        multiple: widths should be multiples of this number, which depends on dtype and device.
    """

    num_layers: int
    widths: dict[int, set[str]]
    multiple: int


def falls_short(measurement: dict[str, Any]) -> bool:
    """Whether a cut is clearly slower than promised, or than the baseline, in at least three quarters of the turns."""
    # Index 2 is the upper quartile: three of four turns are slower than this.
    return measurement["ratio"][2] < max(1.0, CLEARLY * measurement["promised"])


def reasons(measurement: dict[str, Any], prefill: dict[str, Any], dense: Shape, cut: Shape) -> list[str]:
    """Why a measurement falls short.

    Args:
        measurement: a measurement of `bench` with its `profile`: seconds by kind of operator, for baseline and cut.
        prefill: the measurement of the prefill of the same run, with its profile.
        dense: shape of the baseline.
        cut: shape of the cut model.
    """
    if measurement["promised"] <= 1:
        return [WORDS["no_gain"].format(**measurement)]
    facts = _facts(measurement, prefill, dense, cut)
    slow = {kind for kind, faster in facts["faster"].items() if faster < CLEARLY * measurement["promised"]}
    long = {kind for kind, share in facts["share"].items() if share >= SHARE}
    # Multiplying takes most of the cut's time, at less than half the rate of a prefill.
    waits = facts["share"]["rest"] < 0.5 and facts["rate"] < facts["prefill_rate"] / 2
    memory = measurement["phase"] == "decode" and waits
    holds = {
        "memory": memory,
        "head": facts["head"][1] >= HEAD_SHARE,
        "odd": not memory and "matmuls" in slow and facts["odd"],
        "narrow": not memory and "matmuls" in slow and not facts["odd"],
        "attention": "attention" in slow & long,
        "rest": "rest" in slow & long,
    }
    return [WORDS[name].format(**facts) for name, it_does in holds.items() if it_does] or [WORDS["nothing"]]


def _facts(measurement: dict[str, Any], prefill: dict[str, Any], dense: Shape, cut: Shape) -> dict[str, Any]:
    """The values with which `WORDS` is formatted."""
    before, after = measurement["profile"]
    read = [number / 1e6 for number in measurement.get("bytes", (0, 1))]
    odd = (f"{width} of {', '.join(sorted(modules))}" for width, modules in odd_widths(dense, cut).items())
    # Each layer is a number of calls, with a fixed cost that narrower layers do not lower.
    same_depth = cut.num_layers == dense.num_layers
    return {
        "rate": _rate(measurement),
        "prefill_rate": _rate(prefill),
        "megabytes": read,
        "read": read[0] / read[1],
        "head": [part / macs for part, macs in zip(measurement.get("head_macs", (0, 0)), measurement["macs"])],
        "faster": {kind: before[kind] / after[kind] if after[kind] else math.inf for kind in after},
        "share": {kind: seconds / sum(after.values()) for kind, seconds in after.items()},
        "multiple": cut.multiple,
        "odd": "; ".join(odd),
        "layers": f"; all {cut.num_layers} layers are kept, with as many calls as before" if same_depth else "",
    }


def _rate(measurement: dict[str, Any]) -> float:
    """GMACs per second of the cut model during its matrix products."""
    seconds = measurement["profile"][1]
    return measurement["macs"][1] / (seconds["matmuls"] + seconds["attention"]) / 1e9


def odd_widths(dense: Shape, cut: Shape) -> dict[int, set[str]]:
    """Widths of the cut that are not multiples, except in modules where the baseline's width was not one either."""
    odd_before = {module for width, modules in dense.widths.items() if width % dense.multiple for module in modules}
    odd = {width: modules - odd_before for width, modules in sorted(cut.widths.items()) if width % cut.multiple}
    return {width: modules for width, modules in odd.items() if modules}
