"""Mistral: Llama without biases. In its config, heads and hidden size are independent."""

from dataclasses import replace

from .llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", must_divide=(), alternative=None)
