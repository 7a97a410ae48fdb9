"""RoBERTa: BERT with other heads."""

from dataclasses import replace

from .bert import BERT

ROBERTA = replace(
    BERT,
    model_type="roberta",
    heads=BERT.heads
    | {
        # There is no pooler below this head. Its own inner layer does the same, so its width goes by the same name.
        "ForSequenceClassification": {
            "classifier.dense.weight": "pool hidden @ 1",
            "classifier.dense.bias": "pool",
            "classifier.out_proj.weight": "label pool @ 1",
            "classifier.out_proj.bias": "label",
        },
        "ForMaskedLM": {
            "lm_head.dense.weight": "hidden hidden",
            "lm_head.dense.bias": "hidden",
            "lm_head.layer_norm.weight": "hidden",
            "lm_head.layer_norm.bias": "hidden",
            "lm_head.decoder.weight": "vocab hidden",
            "lm_head.decoder.bias": "vocab",
            "lm_head.bias": "vocab",
        },
    },
)
