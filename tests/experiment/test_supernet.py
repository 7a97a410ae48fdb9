"""`model.supernet`: a search in a larger network of random weights. The shape that it finds is trained afresh."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.recipes import killed_in
from helpers.schema import mistakes
from helpers.tiny import TINY
from transformers import AutoConfig, AutoModelForCausalLM

import hf_dms.experiment.run
import hf_dms.experiment.stages
from hf_dms import DMSTrainer
from hf_dms.training.finetune import DistillationTrainer

NP = ("dms.pipeline=np", "model.supernet={width: 2, depth: 1.5}", "dms.target=1.0", "dms.layout=uniform")
TRAINED = (*NP, "train.max_steps=8", "recover.max_steps=80", "recover.learning_rate=1e-3")


def report_of(out):
    return json.loads((Path(out) / "dms_report.json").read_text())


def numel(folder):
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_the_result_has_the_original_s_budget_and_neither_it_nor_the_page_calls_anything_dense(recipe, dense, capsys):
    code, out = recipe(*TRAINED)
    said = capsys.readouterr().out
    report, original = report_of(out), numel(dense)
    assert code == 0
    assert mistakes(report) == []
    assert report["original"]["num_params"] == original
    assert report["original"]["target"] == 1
    assert report["dense"]["num_params"] > 3 * original  # a weight grows with both of its widths
    assert 0.95 * original < report["pruned"]["num_params"] <= original
    assert numel(out) == report["pruned"]["num_params"]
    assert report["units"]["mlp"] == 2 * TINY["intermediate_size"]
    assert AutoConfig.from_pretrained(out).model_type in ("llama", "mistral")
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    for text in (said, card, page.partition("How it was made")[0]):
        assert "supernet" in text
        assert "dense" not in text.replace(dense.name, "")
    assert "| | supernet | soft masks | pruned | recovered | recovered / supernet |" in card
    assert "2 times as wide and 1.5 times as deep, for at most 1 of the original's params" in card
    assert "trained from fresh weights" in card


def test_an_amount_counts_the_original_s_way(recipe, dense):
    code, out = recipe(*TRAINED, "dms.target=9K")
    report = report_of(out)
    assert code == 0
    assert 8500 < report["pruned"]["num_params"] <= 9000
    assert report["original"]["target"] == pytest.approx(9000 / numel(dense))


def weights_at_the_start(recipe, monkeypatch, *options):
    """The weights at the start of the training after the cut, and those of the search."""
    found = {}
    train = hf_dms.experiment.stages.train_

    def look(model, *args, **kwargs):
        if kwargs["stage"] == "recover":
            found["started"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return train(model, *args, **kwargs)

    def searched(model, *args):
        found["searched"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return steps(model, *args)

    steps = hf_dms.experiment.run.recover_steps
    monkeypatch.setattr(hf_dms.experiment.stages, "train_", look)
    monkeypatch.setattr(hf_dms.experiment.run, "recover_steps", searched)
    code, _ = recipe(*TRAINED, "recover.max_steps=2", "output.overwrite=true", *options)
    monkeypatch.undo()
    assert code == 0
    return found["searched"], found["started"]


def test_a_training_after_the_cut_begins_with_fresh_weights_which_the_seed_alone_decides(recipe, monkeypatch):
    searched, started = weights_at_the_start(recipe, monkeypatch)
    assert searched.keys() == started.keys()
    assert all(not torch.equal(searched[name], started[name]) for name in searched)  # norms too are initialised again
    _, again = weights_at_the_start(recipe, monkeypatch)
    assert all(torch.equal(started[name], again[name]) for name in started)
    _, other = weights_at_the_start(recipe, monkeypatch, "recover.seed=1")
    assert all(torch.equal(started[name], other[name]) == ("norm" in name) for name in started)


def test_a_training_after_the_cut_begins_with_the_weights_of_the_search_if_asked(recipe, monkeypatch):
    searched, started = weights_at_the_start(recipe, monkeypatch, "recover.weights=searched")
    assert all(torch.equal(searched[name], started[name]) for name in searched)


def test_an_interrupted_training_after_the_cut_from_fresh_weights_goes_on_and_ends_the_same(recipe, monkeypatch):
    options = (*TRAINED, "recover.max_steps=8", "train.save_steps=4")
    _, out = recipe(*options)
    whole = AutoModelForCausalLM.from_pretrained(out).state_dict()
    shutil.rmtree(out)
    with killed_in(monkeypatch, DistillationTrainer, "_save_checkpoint", after=True):
        recipe(*options)
    step, steps = DistillationTrainer.training_step, []
    monkeypatch.setattr(DMSTrainer, "training_step", lambda *args, **kwargs: pytest.fail("it was searched again"))
    monkeypatch.setattr(DistillationTrainer, "training_step", lambda *a, **k: steps.append(1) or step(*a, **k))
    assert recipe(*options)[0] == 0
    assert len(steps) == 4
    resumed = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["model.supernet={width: 0.5}"], "model.supernet.width must be a factor of at least 1, got 0.5"),
        (["model.supernet={depth: .inf}"], "model.supernet.depth must be a factor of at least 1, got inf"),
        (["model.supernet={width: true}"], "model.supernet.width must be a number, got True"),
        (["model.supernet={}"], "model.supernet makes nothing larger: give width or depth"),
        (["model.supernet=2"], "model.supernet must be a section with keys"),
        (["model.supernet={wide: 2}"], "Unknown key model.supernet.wide. Did you mean model.supernet.width?"),
        (["dms.pipeline=p"], "model.supernet has random weights, and dms.pipeline is p"),
        (["dms.layout=padded", "dms.prune=[mlp, kv]"], "with dms.layout padded the zeros would become weights"),
        (["recover.lora={}"], "recover.lora needs weights to build on, and recover.weights is fresh"),
        (["recover.weights=new"], "recover.weights must be fresh or searched, got 'new'"),
        (["dms.target=9M"], "dms.target = 9M means 9M params, and the supernet has 0.0"),
        (["dms.target=0.01"], "model.supernet: shares are of the supernet. dms.target = 0.00"),
        (["model.supernet={depth: 1.01}"], "leave every size of this llama as it is"),
        (["dms.prune=[kv]", "model.supernet={width: 1.7}"], "Let dms.prune name hidden too, or choose another width"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_validate(recipe, changed, message, capsys):
    assert recipe(*TRAINED, *changed, command="validate")[0] == 2
    assert message in capsys.readouterr().err


def test_compare_has_no_supernet(recipe, capsys):
    assert recipe(*TRAINED, "compare.strategies={dms: {}}", command="compare")[0] == 2
    assert "With model.supernet the target is a share of another model" in capsys.readouterr().err


def test_a_search_of_more_than_a_tenth_of_the_training_after_the_cut_is_warned_of(recipe, caplog):
    logging.getLogger("transformers").propagate = True
    assert recipe(*TRAINED, command="validate")[0] == 0
    assert "In the paper a search takes at most a tenth" not in caplog.text
    assert recipe(*TRAINED, "recover.max_steps=79", command="validate")[0] == 0
    message = (
        "The search sees 16 examples and the training after the cut 158. In the paper a search takes at most a tenth"
    )
    assert message in caplog.text
    assert recipe(*NP, command="validate")[0] == 0
    assert "Pipeline np without a recover section ends with the weights of a short search" in caplog.text


def test_a_training_after_the_cut_without_a_length_is_ten_searches_long(recipe, capsys):
    assert recipe(*NP, "train.max_steps=9", "recover={}", command="validate")[0] == 0
    said = capsys.readouterr().out
    assert "recover.max_steps: 90" in said
    assert "distillation" not in said
    assert "dms.target: 0.1679 of the supernet (1.0 of the original)" in said
