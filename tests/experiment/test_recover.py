"""A `recover` section without a length: the length that is taken is printed, and used."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.searches import arguments, bit_equal, weights
from helpers.tiny import TINY, Tokens, tiny_llama
from transformers import BertConfig, LlamaConfig, default_data_collator

from hf_dms.experiment.objects import empty_model
from hf_dms.experiment.recipe import build_recipe
from hf_dms.experiment.recover import with_recover_defaults
from hf_dms.experiment.sections import RepairConfig
from hf_dms.tasks.task import Examples
from hf_dms.training.distillation import DistillationConfig
from hf_dms.training.finetune import train_

TEXT = dict(vocab_size=33, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4)


def completed(recover=None, config=None, rows=10**6, processes=1, **sections):
    """The recipe with its `recover` section filled in."""
    values = {
        "model": {"path": "a", "dtype": "float32"},
        "data": {"path": "b", "sequence_length": 256},
        "dms": {"target": 0.8, "pipeline": "p-"},
        "train": {"max_steps": 200, "per_device_train_batch_size": 2, "learning_rate": 7e-4},
        "output": {"path": "c"},
    }
    values = {name: values.get(name, {}) | sections.get(name, {}) for name in values.keys() | sections.keys()}
    recipe = build_recipe(values | ({} if recover is None else {"recover": recover}))
    config = LlamaConfig(**TINY) if config is None else config
    examples = Examples(range(rows), range(4), default_data_collator, (), "examples")
    return with_recover_defaults(recipe, empty_model(recipe, config), examples, processes).recover


CLASSIFIER = dict(model={"task": "text-classification"}, config=BertConfig(**TEXT))


# ---- what is taken ----
def test_an_empty_section_is_a_training_by_the_dense_model_s_logits_alone():
    found = completed({})
    assert found.distillation == DistillationConfig(weight=1.0, temperature=1.0)
    assert found.repair == RepairConfig()
    assert (found.lora, found.float32, found.data) == (None, False, None)
    assert found.train == {
        "gradient_accumulation_steps": 8,  # of 2 × 256 tokens
        "max_steps": 400,
        "learning_rate": 5e-4,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
    }


def test_no_section_a_repair_alone_and_a_section_with_a_length_mean_what_they_say():
    assert (
        completed()
        == build_recipe(
            {"model": {"path": "a"}, "data": {"path": "b"}, "dms": {"target": 0.5}, "output": {"path": "c"}}
        ).recover
    )
    assert completed().train is None
    assert completed({"repair": {"examples": 3}}).train is None
    assert completed({"repair": {}, "lora": None}).train is None
    for length in ({"max_steps": 7}, {"num_train_epochs": 2.0}):
        found = completed(length)
        assert (found.train, found.distillation, found.repair) == (length, None, None)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"learning_rate": 1e-5}, {"train": {"learning_rate": 1e-5}}),
        ({"distillation": {"weight": 0.5}}, {"distillation": DistillationConfig(weight=0.5)}),
        ({"repair": {"examples": 3}, "seed": 4}, {"repair": RepairConfig(examples=3), "train": {"seed": 4}}),
        ({"lora": {"r": 2}}, {"lora": {"r": 2}, "train": {"learning_rate": 2e-4}}),
        ({"float32": True}, {"float32": True}),
        ({"per_device_train_batch_size": 32}, {"train": {
            "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}}),
    ],
)  # fmt: skip
def test_what_the_section_gives_goes_before_what_would_be_taken(given, changed):
    plain, found = completed({}), completed(given)
    expected = dataclasses.replace(plain, **(changed | {"train": plain.train | changed.get("train", {})}))
    assert found == expected


@pytest.mark.parametrize(
    ("sections", "train"),
    [
        (dict(dms={"target": 0.5}), {"max_steps": 1000}),
        (dict(dms={"target": 0.5, "pipeline": "p"}), {"max_steps": 500, "learning_rate": 7e-4}),
        (dict(dms={"target": 0.99}), {"max_steps": 100}),
        (dict(rows=100), {"max_steps": 3 * 7}),  # three times through 100 windows
        (dict(rows=0, data={"path": "self", "held_out": "b", "own_sequences": 64}), {"max_steps": 3 * 4}),
        (dict(processes=4), {"gradient_accumulation_steps": 2}),
        (dict(train={"gradient_accumulation_steps": 20}), {"gradient_accumulation_steps": 20}),
        (dict(finetune={"max_steps": 2, "learning_rate": 3e-5}), {"learning_rate": 3e-5}),
        (CLASSIFIER, {"num_train_epochs": 3.0, "learning_rate": 5e-5, "gradient_accumulation_steps": 8}),
        (CLASSIFIER | {"dms": {"target": 0.6, "pipeline": "p"}}, {"num_train_epochs": 2.0, "learning_rate": 7e-4}),
    ],
)
def test_length_batch_and_rate_follow_from_budget_pipeline_task_and_data(sections, train):
    found = completed({}, **sections).train
    assert {key: found.get(key) for key in train} == train
    assert ("max_steps" in found) != ("num_train_epochs" in found)


def test_the_rate_falls_with_the_size_and_large_models_get_adapters():
    def llama(hidden, layers):
        sizes = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers)
        return LlamaConfig(**TINY | sizes | dict(num_attention_heads=8, num_key_value_heads=8, head_dim=hidden // 8))

    small, large, huge = (completed({}, llama(*sizes)) for sizes in ((1024, 8), (2048, 24), (4096, 40)))
    assert [found.train["learning_rate"] for found in (small, large, huge)] == [3e-4, 7e-5, 2e-4]
    assert (small.lora, large.lora, huge.lora) == (None, None, {"r": 16, "lora_alpha": 32})
    assert completed({}, llama(4096, 40), dms={"layout": "padded", "prune": ["mlp"]}).lora is None
    assert completed({}, model={"quantization": "8bit", "dtype": "bfloat16"}).lora is not None


def test_random_weights_have_no_teacher_and_trained_ones_no_repair():
    found = completed({}, dms={"pipeline": "np"})
    assert (found.distillation, found.repair) == (None, None)
    assert found.train["max_steps"] == 2000  # ten searches
    assert "gradient_accumulation_steps" not in found.train
    assert completed({}, train={"num_train_epochs": 0.5, "max_steps": -1}, dms={"pipeline": "np"}).train == {
        "num_train_epochs": 5.0, "learning_rate": 7e-4, "warmup_steps": 0.05, "lr_scheduler_type": "cosine"
    }  # fmt: skip
    found = completed({"weights": "searched"}, dms={"pipeline": "np"})
    assert (found.distillation, found.train["max_steps"]) == (None, 200)
    found = completed({}, dms={"pipeline": "p"})
    assert found.distillation is not None
    assert found.repair is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_weights_of_half_precision_train_in_float32(dtype):
    config = LlamaConfig(**TINY, dtype=torch.bfloat16)
    assert completed({}, config, model={"dtype": dtype}).float32
    assert not completed({"lora": {}}, config, model={"dtype": dtype}).float32


# ---- the training ----
def test_small_steps_of_half_precision_are_lost_unless_they_are_made_in_float32(tmp_path):
    data = Tokens()
    examples = Examples(data, data, default_data_collator, (), "examples")
    moved = {}
    for float32 in (False, True):
        model, before = (tiny_llama(dtype=torch.bfloat16) for _ in range(2))
        train_(model, arguments(tmp_path / str(float32), max_steps=20, learning_rate=1e-4), examples, float32=float32)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        moved[float32] = sum(
            int((tensor != before.state_dict()[name]).sum()) for name, tensor in model.state_dict().items()
        )
    assert moved[True] > 3 * moved[False]


def test_a_training_in_float32_resumes_exactly(tmp_path):
    data = Tokens()
    examples, found = Examples(data, data, default_data_collator, (), "examples"), []
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    for _ in range(2):
        model = tiny_llama(dtype=torch.bfloat16)
        train_(model, args, examples, float32=True)
        found.append(weights(model))
        shutil.rmtree(tmp_path / "checkpoint-6")
    assert bit_equal(*found)


# ---- what is said and done ----
def test_validate_and_prune_say_what_was_taken_and_the_report_has_it(recipe, capsys):
    assert recipe("recover={}", "dms.pipeline=p-", command="validate")[0] == 0
    said = capsys.readouterr().out
    for line in (
        "recover.distillation: {weight: 1.0, temperature: 1.0}",
        "recover.repair: {examples: 64, epochs: 0, interpolate: true}",
        "recover.max_steps: ", "recover.learning_rate: 0.0005", "recover.lr_scheduler_type: cosine",
    ):  # fmt: skip
        assert f"\n  {line}" in said
    assert recipe("recover={repair: {}}", "dms.pipeline=p-", command="validate")[0] == 0
    assert "recover." not in capsys.readouterr().out
    code, out = recipe("recover={}", "dms.pipeline=p-")
    assert code == 0
    assert "After the cut (recover):\n  recover.repair" in capsys.readouterr().out
    report = json.loads((out / "dms_report.json").read_text())
    assert report["recipe"]["recover"]["distillation"]["weight"] == 1.0
    assert report["recipe"]["recover"]["train"]["learning_rate"] == 5e-4
    assert report["recovered"]["perplexity"] > 0


def test_validate_has_it_in_json_too(recipe, tmp_path, capsys):
    assert recipe("recover={}", "--json", command="validate")[0] == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert "recover.distillation: {weight: 1.0, temperature: 1.0}" in row["taken"]


def test_a_table_recovers_all_strategies_alike(recipe, tmp_path):
    strategies = "compare.strategies={random: {}, longer: {criterion: random, recover: {max_steps: 2}}}"
    assert recipe("recover={repair: {examples: 2}, seed: 3}", strategies, "dms.pipeline=p-", command="compare")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["seen"]["recovered"] for row in rows][1] == 2 * 128 * 2
    assert all("recovered" in row["scores"] for row in rows)


def test_validate_says_what_least_squares_take(recipe, capsys):
    capsys.readouterr()
    refitted = ("dms.search_over=refitted", "dms.pipeline=p-", "dms.prune=[kv, mlp]", "dms.warmup_steps=0")
    assert recipe("recover={repair: {}}", *refitted, command="validate")[0] == 0
    said = capsys.readouterr().out
    assert "\n  memory of the repair: 0.0 GiB for sums, 0.0 GiB for hidden states\n" in said
    assert "\n  memory of the search's refits: 0.0 GiB\n" in said
    assert recipe(command="validate")[0] == 0
    assert "memory" not in capsys.readouterr().out
