"""Who can load a checkpoint: what was run, what was only read in the runtime's source, what cannot work.

`python -m hf_dms.report.runtimes README.md` renews the README's table; `hf-dms report PATH` prints what applies to a
checkpoint. What is called run is what `benchmarks/runtimes.py` and the tests ran, on a CPU, on tiny random models.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BEGIN = "<!-- renewed by `python -m hf_dms.report.runtimes README.md` -->"
END = "<!-- end of the table of runtimes -->"
STATUSES = {
    "run": "it was run",
    "source": "only its source was read; not run",
    "no": "it cannot",
    "unknown": "not looked into",
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text")
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
IMAGES = ("vit", "deit", "dinov2")
ALL = (*DECODERS, *ENCODERS, *IMAGES)
GROUPS = {
    **{tuple(name for name in DECODERS if name != left): f"decoders but `{left}`" for left in ("qwen2", "gemma2")},
    DECODERS: "decoders",
    (*ENCODERS, *IMAGES): "all others",
    ALL: "all",
}


@dataclass(frozen=True)
class Row:
    """What one runtime does with models of some types.

    Attributes:
        runtime: its name.
        version: the one that was run or read.
        models: model types it holds for.
        stock, per_layer: (status, in a few words how or why), for stock and padded folders, and for per-layer ones.
    """

    runtime: str
    version: str
    models: tuple[str, ...]
    stock: tuple[str, str]
    per_layer: tuple[str, str]


REFUSED = ("no", "the converter refuses the class; use `layout: padded` or `uniform`")
UNLESS_DROPPED = "; wrong where dropped layers broke the order of their kinds, which it takes for granted"
VLLM_PER_LAYER = (
    "source",
    "`--model-impl transformers --trust-remote-code`: that backend reads heads from `per_layer_config`",
)
ONE_NUMBER = ("no", "its Transformers backend gives all layers one number of heads")
HEAD_SIZE = {  # (runtime, model type): what to do where the runtime overlooks that config.json has a head_dim
    ("llama.cpp", "granite"): "prune `mlp` and `layers` alone",
    ("vLLM", "qwen2"): "`--model-impl transformers` may take it",
}
PATTERNS = {  # (runtime, model type): (list of config.json, its entry in every n-th layer, n) taken for granted there
    ("llama.cpp", "gemma2"): ("layer_types", "full_attention", 2),
    ("llama.cpp", "gemma3_text"): ("layer_types", "full_attention", 6),
    ("llama.cpp", "smollm3"): ("no_rope_layers", 0, 4),
    ("SGLang", "gemma2"): ("layer_types", "full_attention", 2),
}
ROWS = (
    Row(
        "transformers",
        "5.23.0",
        ALL,
        ("run", "every save reloads the folder and compares outputs"),
        (
            "run",
            "every save reloads the folder and compares outputs; needs `import hf_dms`, or `trust_remote_code=True`",
        ),
    ),
    Row(
        "PEFT",
        "0.21.2",
        ALL,
        ("run", "LoRA: attached, trained a step, merged"),
        ("run", "LoRA: attached, trained a step, merged; no prefix tuning where heads differ"),
    ),
    Row(
        "lm-eval",
        "0.4.13",
        DECODERS,
        ("run", "on Llamas: `hf-dms eval --tasks`, or the harness itself"),
        ("run", "on Llamas: `hf-dms eval --tasks`; the harness itself needs `trust_remote_code=True`"),
    ),
    Row(
        "lm-eval",
        "0.4.13",
        (*ENCODERS, *IMAGES),
        ("no", "it scores language models; `hf-dms eval --data` measures classifiers"),
        ("no", "as for stock"),
    ),
    Row(
        "ONNX Runtime",
        "1.32.0, torch.onnx of torch 2.13.0",
        ALL,
        ("run", "`torch.onnx.export(dynamo=True)`, a forward pass without a cache, same outputs"),
        ("run", "`torch.onnx.export(dynamo=True)`, a forward pass without a cache, same outputs"),
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("llama", "mistral", "qwen2", "qwen3"),
        ("run", "`convert_hf_to_gguf.py`, float32, same outputs"),
        REFUSED,
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("smollm3", "gemma3_text"),
        ("run", f"`convert_hf_to_gguf.py`, float32, same outputs{UNLESS_DROPPED}"),
        REFUSED,
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("granite",),
        ("run", "as for Llama where `hidden_size` is heads × head size: the converter ignores `head_dim`"),
        REFUSED,
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("gemma",),
        ("source", "the converter asks for the dense model's `tokenizer.model` beside the rest"),
        REFUSED,
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("gemma2",),
        ("source", f"the converter asks for the dense model's `tokenizer.model` beside the rest{UNLESS_DROPPED}"),
        REFUSED,
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("bert", "roberta", "xlm-roberta", "camembert", "distilbert"),
        ("source", "the converter names the base and the text classification class of most of them"),
        REFUSED,
    ),
    Row(
        "llama.cpp",
        "that of llama-cpp-python 0.3.36",
        ("electra", *IMAGES),
        ("no", "the converter has no such class"),
        ("no", "as for stock"),
    ),
    Row(
        "vLLM",
        "0.33.0",
        tuple(name for name in DECODERS if name != "qwen2"),
        ("source", "native classes read the sizes from the config (SmolLM3: its Transformers backend)"),
        VLLM_PER_LAYER,
    ),
    Row(
        "vLLM",
        "0.33.0",
        ("qwen2",),
        ("source", "native class where `hidden_size` is heads × head size, else `--model-impl transformers`"),
        VLLM_PER_LAYER,
    ),
    Row(
        "vLLM",
        "0.33.0",
        ("bert", "roberta", "xlm-roberta"),
        ("source", "native classes for text and token classification"),
        ("unknown", "its Transformers backend; the native classes take one size for all layers"),
    ),
    Row(
        "vLLM",
        "0.33.0",
        ("camembert", "distilbert", "electra", *IMAGES),
        ("unknown", "no such native class; its Transformers backend might"),
        ("unknown", "as for stock"),
    ),
    Row(
        "SGLang",
        "0.5.23",
        tuple(name for name in DECODERS if name != "gemma2"),
        ("source", "native classes read the sizes from the config (SmolLM3: its Transformers backend)"),
        ONE_NUMBER,
    ),
    Row(
        "SGLang",
        "0.5.23",
        ("gemma2",),
        ("source", f"native class reads the sizes from the config{UNLESS_DROPPED}"),
        ONE_NUMBER,
    ),
    Row(
        "SGLang",
        "0.5.23",
        ("bert", "xlm-roberta"),
        ("source", "native classes for text classification"),
        ("unknown", "its Transformers backend; the native classes take one size for all layers"),
    ),
    Row(
        "SGLang",
        "0.5.23",
        ("roberta", "camembert", "distilbert", "electra", *IMAGES),
        ("unknown", "no such native class; its Transformers backend might"),
        ("unknown", "as for stock"),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What a runtime does with one checkpoint: a status, one of `STATUSES`, and why."""

    runtime: str
    version: str
    status: str
    words: str


def layout_of(config: dict[str, Any]) -> str:
    """How a folder is written, by its config.json: per_layer, or stock (which padded ones are too)."""
    return "per_layer" if config.get("model_type", "").startswith("dms_") else "stock"


def verdicts(config: dict[str, Any]) -> list[Verdict]:
    """The rows of the table that apply to a checkpoint, with what its sizes change about them.

    Args:
        config: the content of its config.json.

    Returns:
        One for each runtime; none for a model type that hf_dms does not know.
    """
    model_type = config.get("model_type", "").removeprefix("dms_")
    layout = layout_of(config)
    found = []
    for row in ROWS:
        if model_type in row.models:
            status, words = row.per_layer if layout == "per_layer" else row.stock
            words = row.stock[1] if words == "as for stock" else words
            found.append(_for_sizes(Verdict(row.runtime, row.version, status, words), config, layout))
    return found


def _for_sizes(verdict: Verdict, config: dict[str, Any], layout: str) -> Verdict:
    """A verdict, changed where the sizes of a checkpoint decide."""
    heads, hidden, head_dim = (config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    remedy = HEAD_SIZE.get((verdict.runtime, config["model_type"]))
    if remedy and head_dim and heads * head_dim != hidden:
        words = f"it takes hidden_size / heads for the head size, {hidden} / {heads} instead of {head_dim}: {remedy}"
        return replace(verdict, status="no", words=words)
    if _out_of_order(verdict.runtime, config):
        words = (
            "layers were dropped, and it takes their order for granted instead of reading it: wrong outputs, no error"
        )
        return replace(verdict, status="no", words=words)
    if verdict.runtime == "SGLang" and layout == "per_layer" and verdict.status == "no" and not _heads_differ(config):
        words = "only MLP widths differ here, which its Transformers backend may take: `--model-impl transformers`"
        return replace(verdict, status="source", words=words)
    if verdict.runtime == "llama.cpp" and verdict.status != "no":
        odd = [f"{key} {config[key]}" for key in ("hidden_size", "intermediate_size") if config.get(key, 0) % 256]
        if odd:
            more = f"; K-quants fall back to larger types where rows are no multiple of 256 ({', '.join(odd)})"
            return replace(verdict, words=verdict.words + more)
    return verdict


def _heads_differ(config: dict[str, Any]) -> bool:
    layers = (config.get("per_layer_config") or {}).values()
    return any(key.endswith("heads") for values in layers for key in values)


def _out_of_order(runtime: str, config: dict[str, Any]) -> bool:
    """Whether the kinds of a model's layers do not follow the order that a runtime takes for granted."""
    key, entry, period = PATTERNS.get((runtime, config["model_type"]), ("", None, 1))
    return any((kind == entry) != ((layer + 1) % period == 0) for layer, kind in enumerate(config.get(key) or []))


def table() -> str:
    """The README's table."""
    lines: list[tuple[str, ...]] = [("runtime", "version", "models", "stock, padded", "per-layer"), ("---",) * 5]
    for row in ROWS:
        models = GROUPS.get(row.models) or ", ".join(f"`{name}`" for name in row.models)
        cells = (f"{_mark(status)}: {words}" for status, words in (row.stock, row.per_layer))
        lines.append((row.runtime, row.version, models, *cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mark(status: str) -> str:
    return {"run": "**run**", "source": "read", "no": "no", "unknown": "?"}[status]


def renewed(text: str) -> str:
    """A text whose table of runtimes, between `BEGIN` and `END`, is this one."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text()))
