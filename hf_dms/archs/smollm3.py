"""SmolLM3: Llama in which some layers have no rotary positions. The config lists them."""

from dataclasses import replace

from .qwen2 import QWEN2

# Without the list, SmolLM3Config would take the rotary positions from every fourth of the layers that are left. From
# Qwen2, because SmolLM3Config has no field `head_dim` and no check of heads and hidden size.
SMOLLM3 = replace(QWEN2, model_type="smollm3", config_lists=("layer_types", "no_rope_layers"))
