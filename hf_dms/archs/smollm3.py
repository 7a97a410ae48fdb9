"""SmolLM3: Llama with layers that have no rotary positions, which the config lists."""

from dataclasses import replace

from .qwen2 import QWEN2

SMOLLM3 = replace(QWEN2, model_type="smollm3", config_lists=("layer_types", "no_rope_layers"))
