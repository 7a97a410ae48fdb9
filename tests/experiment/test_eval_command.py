"""`hf-dms eval`: the real harness on every layout, and perplexity and accuracy on a file."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.laws import TEXT
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY, search_, tiny_llama
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from hf_dms import DMSConfig, attach_, prune
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cli import main
from hf_dms.experiment.eval_command import measure_files
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.evaluate import task_of

ROOT = Path(__file__).parents[2]
LAYOUTS = ("uniform", "per_layer", "padded")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama and what each layout makes of it, with a tokenizer."""
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


def test_the_harness_runs_on_every_layout_and_writes_its_own_json(folders, tmp_path):
    # A process of its own: the harness's imports warn, and it reads sys.argv.
    for layout in LAYOUTS[1:]:
        arguments = ["--tasks", "sotu_next_sentence", "sotu_perplexity", "--limit", "3", "--output_path", str(tmp_path)]
        command = ["eval", str(folders / layout), "--include_path", str(ROOT / "recipes" / "lm_eval"), *arguments]
        if layout == "padded":
            command += ["--baseline", str(folders / "uniform")]
        done = subprocess.run([sys.executable, "-m", "hf_dms", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "sotu_next_sentence" in done.stdout
    written = list(tmp_path.rglob("results_*.json"))
    assert len(written) == 3
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
    (row,) = measure_files([str(tmp_path / "bert")], data, None, 2)
    assert row["accuracy"] == 0.75
    assert row["examples"] == "4 texts"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/nowhere"], "eval needs --tasks (of lm-evaluation-harness) or --data (a file)"),
        (["eval", "/nowhere", "--data", "x.txt"], "No model can be read from '/nowhere'"),
    ],
)
def test_a_mistake_is_told(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_options_that_nobody_knows_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "/nowhere", "--data", "x.txt", "--colour", "red"])
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


def test_a_model_for_no_known_task_is_refused(tmp_path):
    BertModel(BertConfig(**(TEXT | {"vocab_size": TINY["vocab_size"]}))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a BertModel; expected one of ForCausalLM"):
        task_of(str(tmp_path))
