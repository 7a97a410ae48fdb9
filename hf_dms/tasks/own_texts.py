"""Texts that a language model writes: calibration data for a model without its training data.

A model that is cut and repaired on one narrow text is ruined for other texts. Texts sampled from the model at
temperature 1 have the distribution of its training data, as far as the model has learned it.
"""

from __future__ import annotations

from collections.abc import Callable
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
    model: PreTrainedModel,
    tokenizer: Any,
    num_texts: int,
    num_tokens: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], int]:
    """Sample texts from a causal language model at temperature 1, from the token that begins a text.

    Args:
        model: the dense model; it is not modified.
        tokenizer: its tokenizer.
        num_texts: number of texts.
        num_tokens: largest number of tokens; the model can end a text earlier.
        seed: seed of the sampling.
        progress: called after each batch with the number of texts that are written and the number of all texts.

    Returns:
        The texts that are not empty, and the number of sampled tokens.

    Raises:
        HfDmsError: the tokenizer has no token that begins or ends a text.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise HfDmsError(
            f"data: {OWN}: the tokenizer has no token that begins or ends a text, which the model needs to start from. "
            "Give other data."
        )
    texts, sampled = [], 0
    generate: Any = model.generate
    # Neither the model's mode nor the random state of what follows depends on whether texts were sampled or read from
    # the cache.
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, num_texts, BATCH):
            begin = torch.full((min(BATCH, num_texts - first), 1), start, device=model.device)
            # All sampling options, because the defaults (top_k 50) and many models' own narrow the distribution. The
            # mask, because the token that begins a text may be the one that pads.
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
            if progress is not None:
                progress(first + len(begin), num_texts)
    return [text for text in texts if text], sampled


def _end(tokenizer: Any) -> int:
    """The token that ends a text and pads the rest; 0 if the tokenizer has none."""
    return 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _num_sampled(tokens: Tensor, end: int) -> int:
    """Number of tokens up to and including the first end-of-text token of each text."""
    ended = (tokens == end).cumsum(-1)
    return int((ended == 0).sum() + (ended > 0).any(-1).sum())
