"""Qwen2: Llama with biases on query, key and value. The stock class uses a `head_dim` in the config."""

from dataclasses import replace

from .llama import LLAMA
from .spec import Dim, with_dims
from .vit import head_dim_of

# Qwen2Config has no field `head_dim`. A dense model's config lacks it, and a cut model's config has it as an extra
# attribute. The class does not have Llama's check of heads and hidden size either.
QWEN2 = replace(
    LLAMA, model_type="qwen2", dims=with_dims(LLAMA.dims, Dim("d", head_dim_of)), must_divide=(), alternative=None
)
