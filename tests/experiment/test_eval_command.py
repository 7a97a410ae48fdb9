"""`hf-dms eval`: the real harness on every layout, and perplexity and accuracy on a file."""

import json
import logging
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import fresh
from helpers.data import letters, write_rows
from helpers.laws import TEXT
from helpers.marks import slow
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY, search_, tiny_llama
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from hf_dms import DMSConfig, attach_, prune
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cli import main
from hf_dms.experiment.eval_command import measure_files
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.registry import task_of

ROOT = Path(__file__).parents[2]
SOTU = str(ROOT / "recipes" / "data" / "sotu_heldout.jsonl")
LAYOUTS = ("uniform", "per_layer", "padded")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama and its cut in each layout, with a tokenizer."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_llama(max_position_embeddings=128).save_pretrained(folder / "dense")
    save_tokenizer(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    for layout in LAYOUTS:
        model = tiny_llama(max_position_embeddings=128)
        attach_(model, DMSConfig(target=0.8, layout=layout, prune=("kv", "mlp")))
        search_(model)
        save_pruned(prune(model), folder / layout, processor=tokenizer)
    return folder


@pytest.mark.parametrize("layouts", slow(("per_layer",), ("padded", "uniform")))
def test_the_harness_runs_on_every_layout_and_writes_its_own_json(folders, layouts, tmp_path):
    # A process of its own: the harness's imports warn, and it reads sys.argv.
    options = ["--tasks", "sotu_next_sentence", "sotu_perplexity", "--limit", "3", "--output_path", str(tmp_path)]
    options += ["--include_path", str(ROOT / "recipes" / "lm_eval")]
    first, *others = (str(folders / layout) for layout in layouts)
    command = ["eval", first, *options, *(word for other in others for word in ("--baseline", other))]
    done = fresh.run(["-m", "hf_dms", *command])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("sotu_next_sentence") >= len(layouts)
    written = list(tmp_path.rglob("results_*.json"))
    assert len(written) == len(layouts)
    for file in written:
        results = json.loads(file.read_text())["results"]
        assert results["sotu_next_sentence"]["acc_stderr,none"] > 0 or results["sotu_next_sentence"]["acc,none"] in (
            0,
            1,
        )
        assert results["sotu_perplexity"]["bits_per_byte,none"] > 0


def test_perplexity_of_a_file_at_several_lengths(folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(64)))
    paths = [str(folders / "per_layer"), "--baseline", str(folders / "dense")]
    assert main(["eval", *paths, "--data", str(tmp_path / "text.txt"), "--lengths", "8", "16"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["examples"] for row in rows] == [
        "8 sequences of 8 tokens", "8 sequences of 8 tokens", "4 sequences of 16 tokens", "4 sequences of 16 tokens",
    ]  # fmt: skip
    for dense, pruned in (rows[:2], rows[2:]):
        assert pruned["perplexity"] == pytest.approx(dense["perplexity"] * math.exp(pruned["difference"]))


def test_accuracy_of_a_classifier_on_a_file(tmp_path):
    model = BertForSequenceClassification(
        BertConfig(**TEXT, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    )
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 100.0]))  # always yes
    model.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    rows = [{"text": "w1 w2", "label": label} for label in ("yes", "yes", "no", "yes")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(tmp_path / "data.jsonl"), held_out=str(tmp_path / "data.jsonl"))
    (row,) = measure_files([str(tmp_path / "bert")], data, None, None, 2)
    assert row["accuracy"] == 0.75
    assert row["examples"] == "4 texts"


# ---- lengths and comparisons ----
def short_text(path, words):
    path.write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(words)))
    return str(path)


def measured(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON


@pytest.mark.parametrize(
    ("words", "expected"),
    [(300, "2 sequences of 128 tokens"), (128, "1 sequences of 128 tokens"), (50, "1 sequences of 51 tokens")],
)
def test_default_lengths_on_a_short_text_measure_what_they_can(words, expected, folders, tmp_path, capsys):
    (row,) = measured(capsys, folders / "dense", "--data", short_text(tmp_path / "a.txt", words))
    assert row["examples"] == expected
    assert row["perplexity"] > 1


def test_what_is_left_out_is_said(folders, tmp_path, capsys):
    assert main(["eval", str(folders / "dense"), "--data", short_text(tmp_path / "a.txt", 300)]) == 0
    assert "Windows of 2048 tokens are left out: the text has 301." in capsys.readouterr().err


def test_a_length_that_is_asked_for_and_does_not_fit_is_refused(folders, tmp_path, capsys):
    arguments = [str(folders / "dense"), "--data", short_text(tmp_path / "a.txt", 50), "--lengths", "16", "64"]
    assert main(["eval", *arguments]) == 2
    assert "has 51 tokens, less than one sequence of 64" in capsys.readouterr().err


def test_windows_longer_than_the_model_was_made_for_warn(folders, tmp_path, caplog, capsys):
    text = short_text(tmp_path / "a.txt", 300)
    with caplog.at_level(logging.WARNING):
        measured(capsys, folders / "dense", "--data", text, "--lengths", 128)
        assert not caplog.records
        measured(capsys, folders / "dense", "--data", text, "--lengths", 129)
    assert "A window has 129 tokens, and the model was made for at most 128" in caplog.text


def test_models_with_different_tokenizers_are_not_compared(folders, tmp_path, capsys):
    shutil.copytree(folders / "dense", tmp_path / "other")
    letters().save_pretrained(tmp_path / "other")
    paths = [str(tmp_path / "other"), "--baseline", str(folders / "dense")]
    assert main(["eval", *paths, "--data", short_text(tmp_path / "a.txt", 50)]) == 2
    assert re.search(r"The tokenizers of .*dense and .*other make different tokens of .*a.txt", capsys.readouterr().err)


def test_models_of_different_tasks_are_not_compared(folders, tmp_path):
    BertForSequenceClassification(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"dense is a model for text-generation, .*bert one for text-classification"):
        measure_files([str(folders / "dense"), str(tmp_path / "bert")], DataConfig(path="x"), None, None, 2)


def test_texts_are_cut_off_where_the_positions_of_a_classifier_end(tmp_path, capsys):
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    for folder in ("a", "b"):
        BertForSequenceClassification(BertConfig(**TEXT, **names)).save_pretrained(tmp_path / folder)
        save_tokenizer(tmp_path / folder)
    path = write_rows(tmp_path / "long.csv", [{"text": "w1 " * 40, "label": i % 2} for i in range(4)])
    rows = measured(capsys, tmp_path / "a", "--baseline", tmp_path / "b", "--data", path)
    assert [row["examples"] for row in rows] == ["4 texts"] * 2
    assert rows[1]["difference"] == rows[1]["accuracy"] - rows[0]["accuracy"]


def test_a_decoder_without_a_padding_token_classifies_texts_of_any_length_as_each_by_itself(tmp_path):
    model = tiny_llama(LlamaForSequenceClassification, pad_token_id=None)
    model.save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    texts = [" ".join(WORDS[i * j % len(WORDS)] for j in range(1, i + 2)) for i in range(1, 9)]
    with torch.no_grad():
        classes = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    rows = [{"text": text, "label": number} for text, number in zip(texts, classes)]
    data = DataConfig(path=write_rows(tmp_path / "a.jsonl", rows), held_out=str(tmp_path / "a.jsonl"))
    (row,) = measure_files([str(tmp_path / "llama")], data, None, None, 4)
    assert row["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/nowhere"], "eval needs --tasks (of lm-evaluation-harness) or --data (a file)"),
        (["eval", "/nowhere", "--data", SOTU], "No model can be read from '/nowhere'"),
        (["eval", "/nowhere", "--data", SOTU, "--lengths", "8", "0"], "--lengths must be at least 2, got 0."),
        (["eval", "/nowhere", "--data", SOTU, "--examples", "0"], "--examples must be at least 1, got 0."),
        (["eval", "/nowhere", "--data", SOTU, "--batch-size", "0"], "--batch-size must be at least 1, got 0."),
        (["eval", "/nowhere", "--data", "x.txt"], "there is no file 'x.txt'"),
    ],
)
def test_a_mistake_is_told(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_task_that_the_harness_does_not_have_is_told(monkeypatch, capsys):
    def refuse():
        raise ValueError("Tasks not found: lambda")

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", SimpleNamespace(cli_evaluate=refuse))
    assert main(["eval", "/nowhere", "--tasks", "lambda"]) == 2
    assert "--tasks: lm-evaluation-harness says: Tasks not found: lambda. `lm_eval ls" in capsys.readouterr().err


def test_options_that_nobody_knows_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "/nowhere", "--data", "x.txt", "--colour", "red"])
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


def test_a_model_for_no_known_task_is_refused(tmp_path):
    BertModel(BertConfig(**(TEXT | {"vocab_size": TINY["vocab_size"]}))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a BertModel; expected one of ForCausalLM"):
        task_of(str(tmp_path))
