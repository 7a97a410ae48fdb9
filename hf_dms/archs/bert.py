"""BERT: multi-head attention, plain MLP, layer norms after each block, learned positions.

Every value of the residual stream is the output of a norm, so masking the norms is enough for the hidden size here too.
Read it next to transformers' `BertLayer`.
"""

from .spec import ArchSpec, Dim

BERT = ArchSpec(
    model_type="bert",
    layers="encoder.layer",
    dims=(
        Dim("heads", "num_attention_heads", scope="layer"),
        Dim("mlp", "intermediate_size", scope="layer"),
        Dim("hidden", "hidden_size", scope="model"),
        Dim("layers", "num_hidden_layers", scope="depth"),
        # Width of the pooler's output. Its units are its own, but the config has one number for both widths.
        Dim("pool", "hidden_size", scope="model", follows="hidden"),
        Dim("d", "hidden_size // num_attention_heads"),
        Dim("vocab", "vocab_size"),
        Dim("position", "max_position_embeddings"),
        Dim("type", "type_vocab_size"),
        Dim("label", "num_labels"),
    ),
    params={
        "embeddings.word_embeddings.weight": "vocab hidden",
        "embeddings.position_embeddings.weight": "position hidden",
        "embeddings.token_type_embeddings.weight": "type hidden",
        "embeddings.LayerNorm.weight": "hidden",
        "embeddings.LayerNorm.bias": "hidden",
        "encoder.layer.{i}.attention.self.query.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.self.query.bias": "(heads d)",
        "encoder.layer.{i}.attention.self.key.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.self.key.bias": "(heads d)",
        "encoder.layer.{i}.attention.self.value.weight": "(heads d) hidden",
        "encoder.layer.{i}.attention.self.value.bias": "(heads d)",
        "encoder.layer.{i}.attention.output.dense.weight": "hidden (heads d)",
        "encoder.layer.{i}.attention.output.dense.bias": "hidden",
        "encoder.layer.{i}.attention.output.LayerNorm.weight": "hidden",
        "encoder.layer.{i}.attention.output.LayerNorm.bias": "hidden",
        "encoder.layer.{i}.intermediate.dense.weight": "mlp hidden",
        "encoder.layer.{i}.intermediate.dense.bias": "mlp",
        "encoder.layer.{i}.output.dense.weight": "hidden mlp",
        "encoder.layer.{i}.output.dense.bias": "hidden",
        "encoder.layer.{i}.output.LayerNorm.weight": "hidden",
        "encoder.layer.{i}.output.LayerNorm.bias": "hidden",
        "pooler.dense.weight": "pool hidden @ 1",  # it reads the first token alone
        "pooler.dense.bias": "pool",
    },
    heads={
        "ForSequenceClassification": {"classifier.weight": "label pool @ 1", "classifier.bias": "label"},
        "ForTokenClassification": {"classifier.weight": "label hidden", "classifier.bias": "label"},
        "ForQuestionAnswering": {"qa_outputs.weight": "label hidden", "qa_outputs.bias": "label"},
        "ForMaskedLM": {
            # The decoder shares its weight with the word embeddings, so it reads the units of the stream again.
            "cls.predictions.transform.dense.weight": "hidden hidden",
            "cls.predictions.transform.dense.bias": "hidden",
            "cls.predictions.transform.LayerNorm.weight": "hidden",
            "cls.predictions.transform.LayerNorm.bias": "hidden",
            "cls.predictions.decoder.weight": "vocab hidden",
            "cls.predictions.decoder.bias": "vocab",
            "cls.predictions.bias": "vocab",
        },
    },
    config={
        "num_attention_heads": "heads",
        "head_dim": "d",  # BertConfig has none. A per-layer one needs it: hidden_size / heads is wrong with fewer heads
        "intermediate_size": "mlp",
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
    },
    # BertSelfAttention derives these from the config, which shows one head while a per-layer model is built.
    attributes={
        "encoder.layer.{i}.attention.self.num_attention_heads": "heads",
        "encoder.layer.{i}.attention.self.attention_head_size": "d",
        "encoder.layer.{i}.attention.self.all_head_size": "heads d",
        "encoder.layer.{i}.attention.self.scaling": "d ** -0.5",
    },
    build_with={"num_attention_heads": 1},  # any hidden size is a multiple of it
    attention="heads d",
    outputs={"pooler_output": "pool"},
    # The stock class computes the head size as hidden_size / num_attention_heads; there is no other way to set it.
    must_equal=(("heads d", "hidden"),),
)
