"""Granite: Llama with constant factors on embeddings, attention, residuals and logits. Pruning does not change them."""

from dataclasses import replace

from .qwen2 import QWEN2

GRANITE = replace(QWEN2, model_type="granite")
