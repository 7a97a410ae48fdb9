"""`hf-dms bench`: counts, the arithmetic of ratios, and the reasons for constructed cases. No test depends on time."""

import json
import os
from multiprocessing import get_context

import pytest
import torch
from helpers.laws import batch_for, searched, tiny
from helpers.tiny import tiny_llama
from transformers import (
    BertForSequenceClassification,
    DetrForObjectDetection,
    LlamaForSequenceClassification,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from hf_dms import prune
from hf_dms.archs.bind import bind
from hf_dms.archs.costs import build_cost
from hf_dms.archs.registry import spec_for
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cli import main
from hf_dms.measure import speed
from hf_dms.measure.bench import bench, bench_table, explain_, measure, quartiles, shape_of
from hf_dms.measure.reasons import Shape, falls_short, odd_widths, reasons
from hf_dms.measure.speed import Run, costs_of, in_turns, inputs_for, peak_bytes, profiled, run_with, seconds_per_batch

CAUSAL = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama and a per-layer cut of it."""
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_llama()
    model.save_pretrained(folder / "dense")
    searched(model, layout="per_layer", prune=("kv", "mlp"))
    save_pruned(prune(model), folder / "cut")
    return folder


@pytest.fixture
def no_processes(monkeypatch):
    """Replace the measurement of peak memory, whose new process would take seconds to import torch."""
    monkeypatch.setattr("hf_dms.measure.bench.peak_bytes", lambda path, *how: 2**20)


# ---- what is counted ----
def macs_by_the_description(model, resource_scope, length):
    bound = bind(spec_for(model.config), model)
    sizes = {name: torch.tensor([size]) for name, size in bound.sizes.items()}
    return float(build_cost(bound, model, "macs", resource_scope, length).count(sizes))


def test_macs_of_a_prefill_are_those_of_the_description_with_the_head_at_one_position():
    model, run = tiny_llama(), Run(batch_size=2, sequence_length=8)
    counted = costs_of(model.config, CAUSAL, torch.float32, run)["prefill"]["macs"]
    per_sequence = macs_by_the_description(model, "layers", 8) * 8 + model.lm_head.weight.numel()
    assert counted == 2 * per_sequence


def test_macs_of_images_and_texts_are_those_of_the_description():
    image, text = tiny(ViTForImageClassification), tiny(BertForSequenceClassification)
    tokens = bind(spec_for(image.config), image).sizes["tokens"]
    found = costs_of(image.config, "AutoModelForImageClassification", torch.float32, Run(3, 1))
    assert found == {"prefill": {"macs": pytest.approx(3 * tokens * macs_by_the_description(image, "model", None))}}
    found = costs_of(text.config, "AutoModelForSequenceClassification", torch.float32, Run(1, 8))
    assert found["prefill"]["macs"] == pytest.approx(8 * macs_by_the_description(text, "model", 8))
    detr = tiny(DetrForObjectDetection)
    found = costs_of(detr.config, "AutoModelForObjectDetection", torch.float32, Run(2, 1))
    assert found["prefill"]["macs"] == 2 * macs_by_the_description(detr, "model", None)


def test_a_decoding_step_reads_all_linear_maps_and_the_cache():
    model = tiny_llama(dtype=torch.bfloat16)
    found = costs_of(model.config, CAUSAL, torch.bfloat16, Run(batch_size=2, sequence_length=8, new_tokens=3))["decode"]
    maps = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    config = model.config
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (8 + 3)  # keys and values
    assert found["bytes"] == 2 * (sum(weight.numel() for weight in maps) + 2 * cached)
    assert found["head_macs"] == 2 * 3 * model.lm_head.weight.numel()
    attended = (9 + 10 + 11) * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert found["macs"] == 2 * (3 * sum(weight.numel() for weight in maps) + attended)


def test_a_per_layer_cut_costs_what_the_widths_of_its_layers_say(folders):
    model = speed.load_model(str(folders / "cut"), CAUSAL, "auto", "cpu")
    assert model.config.is_heterogeneous
    found = costs_of(model.config, CAUSAL, torch.float32, Run(1, 8))["prefill"]["macs"]
    maps = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    heads = sum(layer.self_attn.o_proj.in_features for layer in model.model.layers)
    assert found == 8 * (maps + 2 * 8 * heads) + model.lm_head.weight.numel()


def test_counting_leaves_the_config_alone(folders):
    config = speed.load_model(str(folders / "cut"), CAUSAL, "auto", "cpu").config
    before = config.to_dict()
    costs_of(config, CAUSAL, torch.float32, Run(1, 4, 1))
    assert config.to_dict() == before


# ---- what is run ----
def test_decoding_with_the_cache_chooses_the_tokens_that_generate_does():
    model, outputs = tiny_llama(), []

    def kept(work):
        outputs.append(work())
        return outputs[-1], None

    inputs = inputs_for(model, Run(2, 5))
    run_with(kept, model, inputs, new_tokens=4)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(outputs[-1].logits[:, -1].argmax(-1), expected[:, -1])
    assert outputs[-1].past_key_values.get_seq_length() == 5 + 4


def test_a_prefill_computes_the_logits_of_the_last_position_only():
    model = tiny_llama()
    output = []
    run_with(lambda work: (output.append(work()), None), model, inputs_for(model, Run(2, 5)))
    assert output[0].logits.shape == (2, 1, 33)


def test_things_are_measured_in_turns_and_the_first_turn_does_not_count():
    order = []

    def number(subject):
        order.append(subject)
        return {"number": len(order)}

    assert in_turns(number, ["a", "b"], 2) == [{"number": [3, 5]}, {"number": [4, 6]}]
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("make", [tiny_llama, lambda **sizes: tiny(ViTForImageClassification, **sizes)])
def test_a_pass_is_timed_for_each_model(make):
    models = [make(), make(num_hidden_layers=1)]
    inputs = batch_for(models[0]) | {"labels": torch.zeros(2, dtype=torch.long)}
    seconds = seconds_per_batch(models, inputs, repeats=1)
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_a_profile_divides_the_time_into_kinds():
    model = tiny_llama()
    found = run_with(profiled, model, inputs_for(model, Run(1, 8)), new_tokens=1)
    assert found.keys() == {"prefill", "decode"}
    assert all(found["prefill"][kind] > 0 for kind in ("matmuls", "attention", "rest"))


# ---- the arithmetic ----
def test_a_ratio_is_the_median_of_the_ratios_of_the_turns(monkeypatch):
    models = [tiny_llama(), tiny_llama(num_hidden_layers=1)]
    times = [{"prefill": [1.0, 4.0, 2.0]}, {"prefill": [0.5, 1.0, 4.0]}]
    monkeypatch.setattr("hf_dms.measure.bench.in_turns", lambda measure, subjects, repeats: times)
    (row,) = measure(models, [model.config for model in models], CAUSAL, Run(2, 8), repeats=3)
    assert row["ratio"] == quartiles([2.0, 4.0, 0.5])
    assert row["ratio"][1] == 2.0
    assert row["per_second"][1][1] == 2 * 8 / 1.0
    assert row["promised"] == row["macs"][0] / row["macs"][1] > 1


def test_quartiles_of_numbers():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("upper", "promised", "expected"),
    [(1.6, 2.0, True), (1.8, 2.0, False), (0.99, 1.05, True), (1.01, 1.05, False), (0.9, 0.5, True)],
)
def test_a_cut_falls_short_where_it_is_clearly_below_the_promise_or_not_faster(upper, promised, expected):
    assert falls_short({"ratio": [0.0, 0.0, upper], "promised": promised}) is expected


# ---- reasons ----
EVEN = Shape(4, {64: {"q_proj"}, 128: {"up_proj"}}, 16)


def case(phase="prefill", dense=(8.0, 1.0, 1.0), cut=(4.0, 0.5, 0.5), **values):
    """A measurement whose MACs promise a factor of 2. By default its profile, (matmuls, attention, rest), keeps it."""
    kinds = ("matmuls", "attention", "rest")
    row = {"phase": phase, "macs": [2e9, 1e9], "promised": 2.0}
    return row | {"profile": [dict(zip(kinds, dense)), dict(zip(kinds, cut))]} | values


def reasons_of(row, dense=EVEN, cut=EVEN, prefill=None):
    return "\n".join(reasons(row, prefill or row, dense, cut))


def test_a_cut_with_as_many_macs_has_nothing_to_gain():
    assert (
        reasons_of(case(macs=[1e9, 2e9], promised=0.5))
        == "it does no fewer MACs than the baseline (2e+09 against 1e+09)"
    )


def test_odd_widths_are_named_with_their_modules():
    odd = Shape(4, {61: {"up_proj", "down_proj"}, 64: {"q_proj"}}, 16)
    told = reasons_of(case(cut=(8.0, 0.5, 0.5)), cut=odd)
    assert (
        "matrix multiplications are 1.00 times as fast; widths are no multiples of 16: 61 of down_proj, up_proj" in told
    )


def test_widths_are_not_blamed_when_matmuls_keep_the_promise_or_when_they_were_odd_before():
    odd = Shape(4, {61: {"up_proj"}}, 16)
    assert "widths" not in reasons_of(case(cut=(4.0, 0.5, 4.0)), cut=odd)
    assert odd_widths(Shape(4, {63: {"up_proj"}}, 16), odd) == {}
    assert odd_widths(EVEN, odd) == {61: {"up_proj"}}
    assert "no width became odd" in reasons_of(case(cut=(8.0, 0.5, 0.5)))


def test_kept_depth_is_told_where_the_rest_does_not_shrink():
    told = reasons_of(case(dense=(8.0, 1.0, 4.0), cut=(4.0, 0.5, 4.0)))
    assert "the rest (norms, activations, copies, the calls themselves) takes 47% of its time" in told
    assert "all 4 layers are kept" in told
    assert "all 4" not in reasons_of(case(dense=(8, 1, 4), cut=(4, 0.5, 4)), cut=Shape(3, EVEN.widths, 16))


def test_attention_that_does_not_shrink_is_told():
    assert "attention takes 47% of its time and is 1.00 times as fast" in reasons_of(
        case(dense=(8, 4, 1), cut=(4, 4, 0.5))
    )


def test_decoding_is_memory_bound_where_it_multiplies_at_less_than_half_the_rate_of_a_prefill():
    numbers = {"bytes": [300e6, 200e6], "head_macs": [0.1e9, 0.1e9]}
    slow = case("decode", **numbers)
    told = reasons_of(slow, prefill=case(cut=(1.0, 0.1, 0.5)))
    assert "memory bound: 0.222 GMAC/s, 0.909 when it prefills" in told
    assert "reads 200 MB of weights and cache, the baseline 300 MB, 1.50 times as much" in told
    assert "memory bound" not in reasons_of(slow)  # as fast as the prefill
    calls = case("decode", cut=(4.0, 0.5, 9.0), **numbers)
    assert "memory bound" not in reasons_of(calls, prefill=case(cut=(1.0, 0.1, 0.5)))  # most of its time is in the rest


def test_a_head_that_dominates_is_told():
    row = case("decode", head_macs=[0.4e9, 0.4e9], bytes=[2.0, 1.0])
    assert "the output embedding keeps its rows: 40% of its MACs are there, 20% of the baseline's" in reasons_of(row)
    assert "embedding" not in reasons_of(row | {"head_macs": [0.2e9, 0.2e9]})


def test_a_shortfall_that_the_profile_does_not_show_is_said_to_be_one():
    assert reasons_of(case()).startswith(
        "no profiled part of the run falls short of the promise: was the machine busy?"
    )


def test_the_shape_of_a_live_model():
    shape = shape_of(tiny_llama(dtype=torch.bfloat16))
    assert shape.num_layers == 3
    assert shape.widths[20] == {"gate_proj", "up_proj", "down_proj"}
    assert shape.widths[12] == {"k_proj", "v_proj"}
    assert shape.multiple == 32  # 64 bytes


def test_a_measurement_that_falls_short_is_profiled_and_explained_and_others_are_not():
    models, run = [tiny_llama(), tiny_llama()], Run(1, 4)
    row = {"phase": "prefill", "batch_size": 1, "macs": [2.0, 1.0], "promised": 2.0, "ratio": [2.0, 2.0, 2.0]}
    explain_(rows := [row.copy(), row | {"batch_size": 2, "ratio": [1.0, 1.0, 1.0]}], models, [run, Run(2, 4)])
    assert rows[0]["reasons"] == []
    assert "profile" not in rows[0]
    assert rows[1]["reasons"]
    assert len(rows[1]["profile"]) == 2


# ---- the command ----
def test_the_command_prints_all_numbers_as_json_and_their_table(folders, no_processes, capsys):
    short = ["--batch-sizes", "1", "--repeats", "2", "--sequence-length", "8", "--new-tokens", "2", "--device", "cpu"]
    paths = [str(folders / "cut"), "--baseline", str(folders / "dense")]
    assert main(["bench", *paths, *short, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in found["models"]] == [paths[2], paths[0]]
    assert [(row["phase"], row["batch_size"]) for row in found["measurements"]] == [("prefill", 1), ("decode", 1)]
    for row in found["measurements"]:
        low, median, high = row["ratio"]
        assert low <= median <= high
        assert row["promised"] == row["macs"][0] / row["macs"][1] > 1
    assert [entry["peak_bytes"]["1"] for entry in found["models"]] == [2**20, 2**20]
    assert {"name", "threads", "dtype", "load_average", "versions"} <= found["machine"].keys()
    printed = bench_table(found)
    assert "| | dense | cut | times as fast | MACs promise |" in printed
    assert "prefill tokens/s, batch 1" in printed


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("head", "unit"), [(BertForSequenceClassification, "texts/s"), (ViTForImageClassification, "images/s")]
)
def test_a_classifier_is_measured_alone_in_examples_per_second(head, unit, tmp_path):
    tiny(head).save_pretrained(tmp_path / "model")
    found = bench(str(tmp_path / "model"), batch_sizes=(1, 3), sequence_length=8, repeats=1, device="cpu")
    assert [(row["phase"], row["batch_size"]) for row in found["measurements"]] == [("prefill", 1), ("prefill", 3)]
    for row in found["measurements"]:
        assert row["per_second"][0][1] == pytest.approx(row["batch_size"] / row["seconds"][0][1])
        assert "ratio" not in row
    assert f"| {unit}, batch 3 |" in bench_table(found)


def test_a_warning_names_the_phase_and_its_reasons(folders, no_processes):
    found = bench(str(folders / "cut"), batch_sizes=(1,), sequence_length=8, new_tokens=0, repeats=1, device="cpu")
    found["models"] *= 2
    (row,) = found["measurements"]
    row |= {"per_second": row["per_second"] * 2, "ratio": [1.0, 1.1, 1.2], "promised": 2.0, "reasons": ["a", "b"]}
    assert bench_table(found).endswith("warning: prefill at batch 1 is 1.10 times as fast, MACs promise 2.00: a. b.")


def test_memory_that_the_system_does_not_tell_is_not_known(folders, monkeypatch):
    monkeypatch.setattr("hf_dms.measure.bench.peak_bytes", lambda path, *how: None)
    found = bench(str(folders / "cut"), batch_sizes=(1,), sequence_length=8, new_tokens=0, repeats=1, device="cpu")
    assert "| peak memory, batch 1 | not known |" in bench_table(found)


# ---- mistakes ----
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"batch_sizes": (1, -2)}, "--batch-sizes must be at least 1, got -2"),
        ({"sequence_length": 0}, "--sequence-length must be at least 1, got 0"),
        ({"new_tokens": -1}, r"--new-tokens must be at least 0 \(0 measures no decoding\), got -1"),
        ({"device": "toaster"}, "--device toaster cannot be used here"),
        (
            {"sequence_length": 60, "new_tokens": 5},
            "takes at most 64 tokens, got 65. Give a smaller --sequence-length",
        ),
    ],
)
def test_options_out_of_range_are_told_before_anything_runs(folders, options, message):
    with pytest.raises(ValueError, match=message):
        bench(str(folders / "cut"), **({"device": "cpu"} | options))


def test_models_for_two_tasks_are_not_compared(folders, tmp_path):
    tiny_llama(LlamaForSequenceClassification).save_pretrained(tmp_path / "classifier")
    message = "classifier is a model for text-classification, .*cut one for text-generation. Their speeds cannot be"
    with pytest.raises(ValueError, match=message):
        bench(str(folders / "cut"), str(tmp_path / "classifier"), device="cpu")


def test_peak_memory_is_that_of_a_new_process(folders):
    assert peak_bytes(str(folders / "cut"), CAUSAL, "auto", "cpu", Run(1, 8)) > 2**26  # torch alone takes more


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12, of a fork
def test_a_process_that_the_system_ends_is_told(monkeypatch):
    monkeypatch.setattr(speed, "get_context", lambda _: get_context("fork"))  # a spawned one would import all anew
    monkeypatch.setattr(speed, "_load_and_run", lambda *given: os._exit(3))
    with pytest.raises(ValueError, match="loaded a/model and ran it at batch size 8 ended with exit code 3"):
        peak_bytes("a/model", CAUSAL, "auto", "cpu", Run(8, 1))


def test_layers_of_all_stages_are_counted():
    model = tiny(ResNetForImageClassification, depths=[2, 3, 1])
    assert shape_of(model).num_layers == 6
