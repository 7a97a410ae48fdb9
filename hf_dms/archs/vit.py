"""ViT: multi-head attention, plain MLP, layer norms before each block, an image cut into patches.

Read it next to transformers' `ViTLayer`. The stock class uses a `head_dim` in the config, so heads and hidden size are
independent.
"""

from .spec import ArchSpec, Dim


def head_dim_of(config) -> int:
    """The size of a head, as the stock class computes it."""
    # Not a field of the config class: a dense model's config lacks it, a cut model's has it.
    return getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)


def sides(size) -> tuple[int, int]:
    """Height and width from a config's value, which is one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_sides(config) -> tuple[int, int]:
    """Height and width of images; 224 pixels for networks that take any size and have none in their config."""
    return sides(getattr(config, "image_size", 224))


def num_patches(config) -> int:
    """Number of patches of an image."""
    (height, width), (patch_height, patch_width) = sides(config.image_size), sides(config.patch_size)
    return (height // patch_height) * (width // patch_width)


IMAGE = (
    Dim("channels", "num_channels"),
    Dim("height", lambda config: image_sides(config)[0]),
    Dim("width", lambda config: image_sides(config)[1]),
)
PATCH = (
    Dim("patch_height", lambda config: sides(config.patch_size)[0]),
    Dim("patch_width", lambda config: sides(config.patch_size)[1]),
)

VIT = ArchSpec(
    model_type="vit",
    layers="layers",
    dims=(
        Dim("heads", "num_attention_heads", scope="layer"),
        Dim("mlp", "intermediate_size", scope="layer"),
        Dim("hidden", "hidden_size", scope="model"),
        Dim("layers", "num_hidden_layers", scope="depth"),
        Dim("d", head_dim_of),
        Dim("pool", "pooler_output_size"),  # a number of its own, unlike BERT's, so it need not follow `hidden`
        Dim("label", "num_labels"),
        Dim("one", "1"),
        Dim("patches", num_patches),
        Dim("tokens", lambda config: num_patches(config) + 1),  # the class token comes first
        *IMAGE,
        *PATCH,
    ),
    params={
        "embeddings.cls_token": "one one hidden",
        "embeddings.position_embeddings": "one tokens hidden",
        "embeddings.patch_embeddings.projection.weight": "hidden channels patch_height patch_width @ patches",
        "embeddings.patch_embeddings.projection.bias": "hidden",
        "layers.{i}.layernorm_before.weight": "hidden",
        "layers.{i}.layernorm_before.bias": "hidden",
        "layers.{i}.attention.q_proj.weight": "(heads d) hidden",
        "layers.{i}.attention.q_proj.bias": "(heads d)",
        "layers.{i}.attention.k_proj.weight": "(heads d) hidden",
        "layers.{i}.attention.k_proj.bias": "(heads d)",
        "layers.{i}.attention.v_proj.weight": "(heads d) hidden",
        "layers.{i}.attention.v_proj.bias": "(heads d)",
        "layers.{i}.attention.o_proj.weight": "hidden (heads d)",
        "layers.{i}.attention.o_proj.bias": "hidden",
        "layers.{i}.layernorm_after.weight": "hidden",
        "layers.{i}.layernorm_after.bias": "hidden",
        "layers.{i}.mlp.fc1.weight": "mlp hidden",
        "layers.{i}.mlp.fc1.bias": "mlp",
        "layers.{i}.mlp.fc2.weight": "hidden mlp",
        "layers.{i}.mlp.fc2.bias": "hidden",
        "layernorm.weight": "hidden",
        "layernorm.bias": "hidden",
        # At one position: it reads the class token alone. That matters for MACs.
        "pooler.dense.weight": "pool hidden @ 1",
        "pooler.dense.bias": "pool",
    },
    heads={"ForImageClassification": {"classifier.weight": "label hidden @ 1", "classifier.bias": "label"}},
    config={
        "num_attention_heads": "heads",
        "head_dim": "d",
        "intermediate_size": "mlp",
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
    },
    attributes={"layers.{i}.attention.num_attention_heads": "heads"},
    attention="heads d",
    outputs={"pooler_output": "pool"},
    tokens="tokens",
    image="channels height width",
)
