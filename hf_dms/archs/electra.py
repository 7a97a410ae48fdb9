"""ELECTRA: BERT without a pooler, and with its own width of the embeddings.

If that width is not the hidden size, there is a projection, and the first layer reads its output without a norm.
"""

from dataclasses import replace

from .bert import BERT
from .roberta import ROBERTA
from .spec import Dim, with_dims

ELECTRA = replace(
    BERT,
    model_type="electra",
    dims=with_dims(BERT.dims, Dim("embedding", "embedding_size", same_as="hidden")),
    params={name: axes for name, axes in BERT.params.items() if not name.startswith("pooler.")}
    | {
        "embeddings.word_embeddings.weight": "vocab embedding",
        "embeddings.position_embeddings.weight": "position embedding",
        "embeddings.token_type_embeddings.weight": "type embedding",
        "embeddings.LayerNorm.weight": "embedding",
        "embeddings.LayerNorm.bias": "embedding",
        "embeddings_project.weight": "hidden embedding",
        "embeddings_project.bias": "hidden",
    },
    heads=BERT.heads
    | {
        "ForSequenceClassification": ROBERTA.heads["ForSequenceClassification"],  # the modules have the same names
        "ForMaskedLM": {
            # Back to the width of the embeddings, with which `generator_lm_head` is tied.
            "generator_predictions.dense.weight": "embedding hidden",
            "generator_predictions.dense.bias": "embedding",
            "generator_predictions.LayerNorm.weight": "embedding",
            "generator_predictions.LayerNorm.bias": "embedding",
            "generator_lm_head.weight": "vocab embedding",
            "generator_lm_head.bias": "vocab",
        },
    },
    config={"embedding_size": "embedding", **BERT.config},
    unnormed=("embeddings_project",),  # the norm of the embeddings is in front of it
    must_differ=(("embedding", "hidden"),),  # the stock class has no projection between widths that are equal
)
