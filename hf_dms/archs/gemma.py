"""Gemma, Gemma 2 and the text model of Gemma 3: Llama whose hidden size is not pruned, as it scales the embeddings too.

With the hidden size fixed no norm is masked, so it does not matter that theirs multiply by 1 + weight.
"""

from dataclasses import replace

from .llama import LLAMA
from .spec import Dim, with_dims

GEMMA = replace(
    LLAMA,
    model_type="gemma",
    dims=with_dims(LLAMA.dims, Dim("hidden", "hidden_size")),
    must_divide=(),
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
    must_divide=LLAMA.must_divide,
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    params=GEMMA2.params | {"layers.{i}.self_attn.q_norm.weight": "d", "layers.{i}.self_attn.k_norm.weight": "d"},
)
