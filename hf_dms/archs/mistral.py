"""Mistral: Llama without biases, whose config leaves heads and hidden size free of each other."""

from dataclasses import replace

from .llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", must_divide=(), alternative=None)
