"""If the vocabulary is resized between `attach_` and `prune`, the budget is that of the resized model."""

import pytest
import torch
from helpers.tiny import search_, tiny_llama, token_batch

from hf_dms import DMSConfig, attach_, plan_of, prune
from hf_dms.gating.attach import gates_of


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocabulary", [20, 333])
def test_the_budget_is_that_of_the_model_as_it_is(vocabulary, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    attach_(model, DMSConfig(target=0.85))
    search_(model)
    model.resize_token_embeddings(vocabulary)
    dense = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("dms_gates."))
    inputs = token_batch(vocab=20)
    pruned = prune(model, inputs=inputs)
    assert gates_of(model).dense_resource == dense
    assert pruned.num_parameters() <= 0.85 * dense
    assert pruned.config.vocab_size == vocabulary
    fresh = tiny_llama(tie_word_embeddings=tied)
    fresh.resize_token_embeddings(vocabulary)
    attach_(fresh, DMSConfig(target=0.85))
    gates_of(fresh).load_search_state_(gates_of(model).search_state())
    assert plan_of(model).sizes == plan_of(fresh).sizes


def test_a_pruned_dim_that_was_resized_is_an_error():
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.85, prune=("mlp",)))
    search_(model)
    model.config.intermediate_size = 18
    for layer in model.model.layers:
        for name, shape in (("gate_proj", (18, 24)), ("up_proj", (18, 24)), ("down_proj", (24, 18))):
            getattr(layer.mlp, name).weight = torch.nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError, match="The model has 18 units of mlp, and had 20 when its gates were put on"):
        prune(model)
