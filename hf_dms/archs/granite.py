"""Granite: Llama with constant factors on embeddings, attention, residuals and logits. Pruning does not change them."""

from dataclasses import replace

from .qwen2 import QWEN2

# From Qwen2, not Llama: GraniteConfig has no field `head_dim` and no check of heads and hidden size either.
GRANITE = replace(QWEN2, model_type="granite")
