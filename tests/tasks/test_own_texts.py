"""Texts that a model writes itself follow its distribution, and the same seed gives the same texts."""

import pytest
import torch
from helpers.data import letters
from helpers.tiny import tiny_llama

from hf_dms.tasks.own_texts import own_texts


def test_tokens_are_as_frequent_as_the_model_says():
    """1024 first tokens are compared with the softmax after the token that begins a text: temperature 1, no top-k."""
    model, tokenizer = tiny_llama(), letters()
    model.lm_head.weight.data *= 30  # so that the distribution is not uniform
    texts, sampled = own_texts(model, tokenizer, 1024, 1)
    assert sampled == 1024
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    found = torch.zeros_like(expected)
    for text in texts:
        found[tokenizer.convert_tokens_to_ids(text)] += 1 / 1024
    seen = torch.arange(3, 29)  # without special tokens
    assert expected[seen].max() > 3 * expected[seen].min()
    assert (found - expected)[seen].abs().max() < 4 * (expected[seen].max() / 1024) ** 0.5


def test_the_same_seed_gives_the_same_texts_and_nothing_else_changes():
    model = tiny_llama().train()
    before = torch.random.get_rng_state()
    first, again, other = (own_texts(model, letters(), 5, 6, seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def test_a_text_ends_where_the_model_ends_it():
    model, tokenizer = tiny_llama(), letters()
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[tokenizer.eos_token_id] = 1e3
    texts, sampled = own_texts(model, tokenizer, 3, 20)
    for text in texts:
        assert len(text.split()) < 20
    assert sampled < 60


def test_a_tokenizer_without_a_token_to_begin_with_is_an_error():
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        own_texts(tiny_llama(), letters(bos_token=None, eos_token=None), 1, 1)


def test_progress_is_told_after_each_batch():
    told = []
    own_texts(tiny_llama(), letters(), 40, 1, progress=lambda *done: told.append(done))
    assert told == [(32, 40), (40, 40)]
