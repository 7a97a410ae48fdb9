"""The table of runtimes covers what is supported, is in the documentation, and gives each checkpoint its rows."""

import json
from pathlib import Path

import pytest
import transformers
from helpers.tiny import tiny_llama

from hf_dms.archs.registry import ARCHS, SPECS
from hf_dms.report.runtimes import END, ROWS, STATUSES, renewed, runtimes_table, verdicts

ROOT = Path(__file__).parents[2]
RUNTIMES = {row.runtime for row in ROWS}
MEASURED = [json.loads(line) for line in (ROOT / "benchmarks" / "runtimes.jsonl").read_text().splitlines()[1:]]
NAMES = {"peft": "PEFT", "onnxruntime": "ONNX Runtime", "llama_cpp_python": "llama.cpp"}


def config_of(model_type, **more):
    return {"model_type": model_type, "hidden_size": 256, "intermediate_size": 512} | more


def told(runtime, config):
    return next(verdict for verdict in verdicts(config) if verdict.runtime == runtime)


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "runtimes.md").read_text()
    assert page.count(END) == 1
    assert renewed(page) == page, "out of date. Run python -m hf_dms.report.runtimes docs/runtimes.md"
    assert renewed(page.replace("convert_hf_to_gguf.py", "another")) == page


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_type)
def test_every_architecture_and_runtime_has_one_row_per_layout(spec):
    for prefix in ("", "dms_"):
        found = verdicts(config_of(prefix + spec.model_type))
        assert sorted(verdict.runtime for verdict in found) == sorted(RUNTIMES)
        assert {verdict.status for verdict in found} <= set(STATUSES)
    assert {name for row in ROWS for name in row.model_types()} <= set(ARCHS)


def test_of_other_models_nothing_is_said():
    assert verdicts(config_of("gpt2")) == []


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['runtime']} {row['written']} {row['layout']}")
def test_what_is_called_run_was_run(row):
    model_type = getattr(transformers, row["class"]).config_class.model_type
    per_layer = row["written"].startswith("Dms")
    status = told(NAMES[row["runtime"]], config_of(("dms_" if per_layer else "") + model_type)).status
    ran = row.get("difference", 1) < 1e-3
    assert per_layer == (row["layout"] == "per_layer")
    if "granite" in model_type and "error" in row and not per_layer:
        return  # a padded Granite whose heads are not its hidden size, see below
    assert ran == (status == "run")


def test_every_run_of_these_runtimes_is_in_the_rows():
    ran = {
        (NAMES[row["runtime"]], getattr(transformers, row["class"]).config_class.model_type, row["layout"])
        for row in MEASURED
        if "difference" in row
    }
    for row in ROWS:
        for layout, (status, _) in (("uniform", row.stock), ("per_layer", row.per_layer)):
            if row.runtime in NAMES.values() and status == "run":
                assert {(row.runtime, name, layout) for name in row.model_types()} <= ran


# ---- what sizes change -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("runtime", "model_type"), [("llama.cpp", "granite"), ("vLLM", "qwen2")])
def test_a_head_size_that_a_runtime_overlooks_is_told(runtime, model_type):
    fits = config_of(model_type, num_attention_heads=4, head_dim=64)
    assert told(runtime, fits).status != "no"
    assert told(runtime, fits | {"num_attention_heads": 3}).status == "no"
    assert "256 / 3 instead of 64" in told(runtime, fits | {"num_attention_heads": 3}).words
    assert told(runtime, fits | {"model_type": "llama", "num_attention_heads": 3}).status != "no"


@pytest.mark.parametrize(
    ("runtime", "cls"),
    [("llama.cpp", "Gemma2"), ("llama.cpp", "Gemma3"), ("llama.cpp", "SmolLM3"), ("SGLang", "Gemma2")],
)
def test_layers_whose_order_a_runtime_takes_for_granted_are_told(runtime, cls):
    name = {"Gemma3": "Gemma3Text"}.get(cls, cls)
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=12, head_dim=4).to_dict()
    key, _, period = next(
        row.order[config["model_type"]] for row in ROWS if row.runtime == runtime and config["model_type"] in row.order
    )
    assert told(runtime, config).status != "no"
    tail = config | {key: config[key][:-period]}
    assert told(runtime, tail).status != "no"
    first_dropped = config | {key: config[key][1:]}
    assert "wrong outputs, no error" in told(runtime, first_dropped).words


def test_per_layer_folders_are_told_by_what_differs():
    heads = config_of("dms_llama", per_layer_config={"0": {"num_key_value_heads": 1}})
    widths = config_of("dms_llama", per_layer_config={"0": {"intermediate_size": 8}})
    assert told("SGLang", heads).status == "no"
    assert told("SGLang", widths).status == "source"
    assert told("llama.cpp", widths).status == "no"


def test_rows_for_k_quants_are_told_of_a_real_config():
    words = told("llama.cpp", tiny_llama().config.to_dict()).words
    assert "hidden_size 24, intermediate_size 20" in words
    assert "K-quants" not in told("llama.cpp", config_of("llama")).words


def test_no_cell_breaks_the_table():
    assert len({line.count("|") for line in runtimes_table().splitlines()}) == 1
