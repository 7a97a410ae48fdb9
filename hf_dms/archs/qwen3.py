"""Qwen3: Llama with norms over the head size of each query and key. Pruning does not change them."""

from dataclasses import replace

from .llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    # All heads of a layer share one weight vector, so it stays whole whatever heads go.
    params=LLAMA.params | {"layers.{i}.self_attn.q_norm.weight": "d", "layers.{i}.self_attn.k_norm.weight": "d"},
    must_divide=(),  # Qwen3Config does not compare heads and hidden size
    alternative=None,
)
