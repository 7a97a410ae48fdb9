"""Llama: grouped-query attention, gated MLP, RMS norms before each block, rotary positions.

The other decoders are variations of this description. Read it next to transformers' `LlamaDecoderLayer`.
"""

from .spec import ArchSpec, Dim

LLAMA = ArchSpec(
    model_type="llama",
    layers="layers",
    dims=(
        Dim("kv", "num_key_value_heads", scope="layer"),  # a KV group: its key, its value and its query heads
        Dim("mlp", "intermediate_size", scope="layer"),
        Dim("hidden", "hidden_size", scope="model"),  # the residual stream: one gate for the model
        Dim("layers", "num_hidden_layers", scope="depth"),
        # Query heads per KV group: `repeat_kv` gives every group the same number, so only whole groups go.
        Dim("rep", "num_attention_heads // num_key_value_heads"),
        Dim("d", "head_dim"),  # rotary positions rotate unit i together with unit i + d/2
        Dim("vocab", "vocab_size"),
        Dim("label", "num_labels"),
        Dim("span", "2"),  # start and end of an answer; the class does not ask num_labels, as BERT's does
    ),
    params={
        "embed_tokens.weight": "vocab hidden",
        "layers.{i}.input_layernorm.weight": "hidden",
        # The query heads of a group lie side by side: `repeat_kv` repeats each key in place.
        "layers.{i}.self_attn.q_proj.weight": "(kv rep d) hidden",
        "layers.{i}.self_attn.q_proj.bias": "(kv rep d)",
        "layers.{i}.self_attn.k_proj.weight": "(kv d) hidden",
        "layers.{i}.self_attn.k_proj.bias": "(kv d)",
        "layers.{i}.self_attn.v_proj.weight": "(kv d) hidden",
        "layers.{i}.self_attn.v_proj.bias": "(kv d)",
        "layers.{i}.self_attn.o_proj.weight": "hidden (kv rep d)",
        "layers.{i}.self_attn.o_proj.bias": "hidden",
        "layers.{i}.post_attention_layernorm.weight": "hidden",
        "layers.{i}.mlp.gate_proj.weight": "mlp hidden",
        "layers.{i}.mlp.gate_proj.bias": "mlp",
        "layers.{i}.mlp.up_proj.weight": "mlp hidden",
        "layers.{i}.mlp.up_proj.bias": "mlp",
        "layers.{i}.mlp.down_proj.weight": "hidden mlp",
        "layers.{i}.mlp.down_proj.bias": "hidden",
        "norm.weight": "hidden",
        "lm_head.weight": "vocab hidden",
        # At every token, also to classify a text: the class picks the last token's logits afterwards.
        "score.weight": "label hidden",
        "score.bias": "label",
        "qa_outputs.weight": "span hidden",
        "qa_outputs.bias": "span",
    },
    config={
        "num_attention_heads": "kv rep",
        "num_key_value_heads": "kv",
        "head_dim": "d",
        "intermediate_size": "mlp",
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
    },
    # No `attributes`: LlamaAttention has its head_dim from the config, and `view` finds the number of heads.
    attention="kv rep d",
    cache="kv d",
    # LlamaConfig refuses other sizes even with head_dim set. MistralConfig does not; tensors and maths are the same.
    must_divide=(("kv rep", "hidden"),),
    alternative="mistral",
    alternative_overrides={"sliding_window": None},  # MistralConfig's default attends to the last 4096 tokens only
    alternative_needs=("attention_bias", "mlp_bias"),  # a Mistral has none of these biases
)
