"""SmolLM3: Llama in which some layers have no rotary positions. The config lists them."""

from dataclasses import replace

from .qwen2 import QWEN2

SMOLLM3 = replace(QWEN2, model_type="smollm3", config_lists=("layer_types", "no_rope_layers"))
