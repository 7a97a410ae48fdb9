"""DistilBERT: BERT under other names, without token types and pooler."""

from dataclasses import replace

from .bert import BERT
from .spec import Dim, with_dims

DISTILBERT = replace(
    BERT,
    model_type="distilbert",
    layers="transformer.layer",
    dims=with_dims(
        tuple(dim for dim in BERT.dims if dim.name != "type"),
        Dim("heads", "n_heads", scope="layer"),
        Dim("mlp", "hidden_dim", scope="layer"),
        Dim("hidden", "dim", scope="model"),
        Dim("layers", "n_layers", scope="depth"),
        Dim("pool", "dim", scope="model", follows="hidden"),
        Dim("d", "dim // n_heads"),
    ),
    params={
        "embeddings.word_embeddings.weight": "vocab hidden",
        "embeddings.position_embeddings.weight": "position hidden",
        "embeddings.LayerNorm.weight": "hidden",
        "embeddings.LayerNorm.bias": "hidden",
        "transformer.layer.{i}.attention.q_lin.weight": "(heads d) hidden",
        "transformer.layer.{i}.attention.q_lin.bias": "(heads d)",
        "transformer.layer.{i}.attention.k_lin.weight": "(heads d) hidden",
        "transformer.layer.{i}.attention.k_lin.bias": "(heads d)",
        "transformer.layer.{i}.attention.v_lin.weight": "(heads d) hidden",
        "transformer.layer.{i}.attention.v_lin.bias": "(heads d)",
        "transformer.layer.{i}.attention.out_lin.weight": "hidden (heads d)",
        "transformer.layer.{i}.attention.out_lin.bias": "hidden",
        "transformer.layer.{i}.sa_layer_norm.weight": "hidden",
        "transformer.layer.{i}.sa_layer_norm.bias": "hidden",
        "transformer.layer.{i}.ffn.lin1.weight": "mlp hidden",
        "transformer.layer.{i}.ffn.lin1.bias": "mlp",
        "transformer.layer.{i}.ffn.lin2.weight": "hidden mlp",
        "transformer.layer.{i}.ffn.lin2.bias": "hidden",
        "transformer.layer.{i}.output_layer_norm.weight": "hidden",
        "transformer.layer.{i}.output_layer_norm.bias": "hidden",
    },
    heads=BERT.heads
    | {
        "ForSequenceClassification": {
            # In place of a pooler: it reads the first token, and is as wide as the stream.
            "pre_classifier.weight": "pool hidden @ 1",
            "pre_classifier.bias": "pool",
            "classifier.weight": "label pool @ 1",
            "classifier.bias": "label",
        },
        "ForMaskedLM": {
            "vocab_transform.weight": "hidden hidden",
            "vocab_transform.bias": "hidden",
            "vocab_layer_norm.weight": "hidden",
            "vocab_layer_norm.bias": "hidden",
            "vocab_projector.weight": "vocab hidden",
            "vocab_projector.bias": "vocab",
        },
    },
    # `head_dim` is for per-layer models, as in BERT.
    config={"n_heads": "heads", "head_dim": "d", "hidden_dim": "mlp", "dim": "hidden", "n_layers": "layers"},
    attributes={
        "transformer.layer.{i}.attention.n_heads": "heads",
        "transformer.layer.{i}.attention.attention_head_size": "d",
        "transformer.layer.{i}.attention.scaling": "d ** -0.5",
    },
    # The stock class checks that the heads divide the width. One head divides any width; each layer is resized later.
    build_with={"n_heads": 1},
)
