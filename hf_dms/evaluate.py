"""How good and how fast a model is: held-out perplexity and prefill speed."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, sequences: Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood per predicted token, over sequences that do not overlap.

    Each sequence is scored by itself, from its second token on, with no context from the one before.

    Args:
        model: a causal language model; its mode (training or evaluation) is kept.
        sequences: `[sequences, tokens]` int64.
        batch_size: sequences per forward pass.
    """
    total, count = 0.0, 0
    for batch in sequences.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        labels = batch[:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += labels.numel()
    return math.exp(total / count)


@torch.no_grad()
def tokens_per_second(models: list[PreTrainedModel], input_ids: Tensor, repeats: int = 5) -> list[float]:
    """Median prefill speed of several models on one batch, run in turns so that a noisy machine treats them alike.

    Args:
        models: causal language models.
        input_ids: `[batch, tokens]` int64.
        repeats: timed runs of each, after one that is not timed.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for run in range(repeats + 1):
        for model, times in zip(models, seconds):
            batch = input_ids.to(model.device)
            start = time.perf_counter()
            logits = model(input_ids=batch, use_cache=False, logits_to_keep=1).logits
            float(logits[0, 0, 0])  # waits for the device
            if run > 0:
                times.append(time.perf_counter() - start)
    return [input_ids.numel() / sorted(times)[len(times) // 2] for times in seconds]


def evenly_spaced(sequences: Tensor, count: int) -> Tensor:
    """At most `count` sequences, evenly spaced over all of them."""
    if len(sequences) <= count:
        return sequences
    return sequences[torch.linspace(0, len(sequences) - 1, count).long()]
