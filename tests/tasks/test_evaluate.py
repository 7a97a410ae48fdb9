"""Perplexity follows from the model's own loss, accuracy from its logits, and differences are paired."""

import math

import pytest
import torch
from helpers.laws import batch_for, tiny
from helpers.tiny import tiny_llama, token_batch
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification, ViTForImageClassification

from hf_dms.tasks.evaluate import evenly_spaced, example_scores, summary
from hf_dms.tasks.generation import perplexity
from hf_dms.tasks.registry import TASKS

ACCURACY, PERPLEXITY = TASKS["text-classification"], TASKS["text-generation"]


def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batch_size():
    model, ids = tiny_llama(), token_batch(5, 9)["input_ids"]
    with torch.no_grad():
        expected = math.exp(float(model(input_ids=ids, labels=ids).loss))
    for batch_size in (1, 2, 5):
        assert perplexity(model, ids, batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", [BertForSequenceClassification, ViTForImageClassification])
def test_accuracy_is_the_share_of_largest_logits_at_the_label(head):
    model = tiny(head)
    inputs = batch_for(model, batch=2)
    with torch.no_grad():
        guesses = model(**inputs).logits.argmax(-1)
    labels = torch.stack([guesses[0], (guesses[1] + 1) % 3])  # the first is right, the second wrong
    examples = [{name: tensor[i] for name, tensor in inputs.items()} | {"labels": labels[i]} for i in range(2)]
    for batch_size in (1, 2):
        assert example_scores(model, ACCURACY, examples, default_collate, batch_size).tolist() == [1.0, 0.0]


def test_a_standard_error_is_that_of_the_mean_and_of_the_paired_difference():
    dense, pruned = torch.tensor([1.0, 1, 1, 0]).double(), torch.tensor([1.0, 0, 1, 0]).double()
    found = summary(ACCURACY, pruned, dense)
    assert found["accuracy"] == 0.5
    assert found["stderr"] == pytest.approx(math.sqrt(1 / 3 / 4))
    assert found["difference"] == -0.25
    assert found["difference_stderr"] == pytest.approx(math.sqrt(0.25 / 4))
    assert "difference" not in summary(ACCURACY, dense)


def test_the_standard_error_of_perplexity_is_that_of_the_log_times_itself():
    losses = torch.tensor([1.0, 2.0, 3.0]).double()
    found = summary(PERPLEXITY, losses)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["stderr"] == pytest.approx(math.exp(2) / math.sqrt(3))


def test_one_example_has_no_standard_error():
    assert math.isnan(summary(ACCURACY, torch.ones(1).double())["stderr"])


def test_sequences_are_spread_over_all():
    rows = torch.arange(10)[:, None]
    assert evenly_spaced(rows, 4).flatten().tolist() == [0, 3, 6, 9]
    assert evenly_spaced(rows, 20) is rows


def test_examples_of_a_dataset_are_spread_over_all():
    spread = evenly_spaced([{"labels": i} for i in range(10)], 4)
    assert [example["labels"] for example in spread] == [0, 3, 6, 9]
    assert len(evenly_spaced([1, 2, 3], None)) == 3
