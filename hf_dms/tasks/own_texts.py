"""Texts that a language model writes itself: calibration data for a model whose training data is not at hand.

A model cut and repaired on one narrow text is ruined outside it. What the model says of itself, sampled at temperature
1, is spread as its training data was, as far as it has learned that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..archs.restoring import evaluating
from ..errors import HfDmsError
from .data import OWN

BATCH = 32  # texts written at once


@torch.no_grad()
def own_texts(
    model: PreTrainedModel, tokenizer: Any, num_texts: int, num_tokens: int, seed: int = 0
) -> tuple[list[str], int]:
    """Sample texts from a causal language model at temperature 1, from the token that begins a text.

    Args:
        model: the dense model; it is left as it was.
        tokenizer: its.
        num_texts: how many.
        num_tokens: of the longest; a text that the model ends sooner is shorter.
        seed: of the samples.

    Returns:
        The texts that are not empty, and how many tokens were sampled.

    Raises:
        HfDmsError: the tokenizer has no token that begins or ends a text.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise HfDmsError(
            f"data: {OWN}: the tokenizer has no token that begins or ends a text, from which the model could write. "
            "Give other data."
        )
    texts, sampled = [], 0
    generate: Any = model.generate
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, num_texts, BATCH):
            begin = torch.full((min(BATCH, num_texts - first), 1), start, device=model.device)
            tokens = generate(
                input_ids=begin,
                attention_mask=torch.ones_like(begin),
                max_new_tokens=num_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=_end(tokenizer),
            )[:, 1:]
            texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
            sampled += _num_sampled(tokens, _end(tokenizer))
    return [text for text in texts if text], sampled


def _end(tokenizer: Any) -> int:
    """The token that ends a text, and fills what comes after it; 0 fills where there is none."""
    return 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _num_sampled(tokens: Tensor, end: int) -> int:
    """Tokens up to the first that ends a text, that one included."""
    ended = (tokens == end).cumsum(-1)
    return int((ended == 0).sum() + (ended > 0).any(-1).sum())
