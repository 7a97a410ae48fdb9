"""Gemma, Gemma 2 and the text model of Gemma 3: Llama with a hidden size that is not pruned.

The hidden size also scales the embeddings, so cutting it would change the function. With a fixed hidden size no norm is
masked, so it does not matter that Gemma's norms multiply by 1 + weight.
"""

from dataclasses import replace

from .llama import LLAMA
from .spec import Dim, with_dims

GEMMA = replace(
    LLAMA,
    model_type="gemma",
    dims=with_dims(LLAMA.dims, Dim("hidden", "hidden_size")),
    must_divide=(),  # GemmaConfig has no such check
    alternative=None,
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    params=GEMMA.params
    | {
        "layers.{i}.pre_feedforward_layernorm.weight": "hidden",
        "layers.{i}.post_feedforward_layernorm.weight": "hidden",
    },
    must_divide=LLAMA.must_divide,  # Gemma2Config and Gemma3TextConfig check it again; only the heads can give way
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    params=GEMMA2.params | {"layers.{i}.self_attn.q_norm.weight": "d", "layers.{i}.self_attn.k_norm.weight": "d"},
)
