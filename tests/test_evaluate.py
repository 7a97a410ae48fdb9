"""Perplexity is what the model's own loss says."""

import math

import pytest
import torch
from conftest import tiny_llama, token_batch

from hf_dms.evaluate import evenly_spaced, perplexity, tokens_per_second


def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batch_size():
    model, ids = tiny_llama(), token_batch(5, 9)["input_ids"]
    with torch.no_grad():
        expected = math.exp(float(model(input_ids=ids, labels=ids).loss))
    for batch_size in (1, 2, 5):
        assert perplexity(model, ids, batch_size) == pytest.approx(expected, rel=1e-5)


def test_sequences_are_spread_over_all():
    rows = torch.arange(10)[:, None]
    assert evenly_spaced(rows, 4).flatten().tolist() == [0, 3, 6, 9]
    assert evenly_spaced(rows, 20) is rows


def test_speed_is_measured_for_each_model():
    speeds = tokens_per_second([tiny_llama(), tiny_llama(num_hidden_layers=1)], token_batch()["input_ids"], repeats=1)
    assert len(speeds) == 2
    assert min(speeds) > 0
