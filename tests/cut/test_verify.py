"""The proof: two models that must compute the same are compared on one batch."""

import pytest
import torch
from helpers.tiny import search_, tiny_llama, token_batch
from transformers import LlamaForQuestionAnswering, LlamaModel

from hf_dms import DMSConfig, attach_
from hf_dms.cut.verify import check_same, dummy_inputs, hard_masked, outputs_of
from hf_dms.errors import VerificationError
from hf_dms.gating.attach import gates_of


def test_outputs_that_differ_or_are_not_numbers_are_an_error():
    model, other = tiny_llama(), tiny_llama()
    assert check_same(model, other, token_batch(), ("first", "second")) == 0
    with torch.no_grad():
        other.lm_head.weight[3] += 0.1
    message = "The second model does not compute what the first model does: .* tolerance 1e-04 for torch.float32"
    with pytest.raises(VerificationError, match=message):
        check_same(model, other, token_batch(), ("first", "second"))
    with torch.no_grad():
        other.lm_head.weight.fill_(torch.nan)
    with pytest.raises(VerificationError, match="difference nan"):
        check_same(model, other, token_batch(), ("first", "second"))


def test_outputs_are_logits_or_the_first_output_and_labels_do_not_matter():
    model, batch = tiny_llama(), token_batch()
    assert torch.equal(outputs_of(model, batch | {"labels": batch["input_ids"]}), model(**batch).logits)
    base = tiny_llama(LlamaModel)
    assert torch.equal(outputs_of(base, batch), base(**batch).last_hidden_state)
    answers = tiny_llama(LlamaForQuestionAnswering)
    assert torch.equal(outputs_of(answers, batch), answers(**batch).start_logits)


def test_dummy_inputs_are_within_the_vocabulary():
    model = tiny_llama(vocab_size=3)
    assert int(dummy_inputs(model)["input_ids"].max()) < 3
    assert torch.isfinite(outputs_of(model, dummy_inputs(model))).all()


@pytest.mark.parametrize("training", [False, True])
def test_hard_masked_is_over_when_its_block_is_even_after_an_error(training):
    model = tiny_llama().train(training)
    attach_(model, DMSConfig(target=0.5))
    search_(model)
    sizes = {name: torch.ones(dim.rows, dtype=torch.long) for name, dim in gates_of(model).dims.items()}

    def fail_inside():
        with hard_masked(model, sizes):
            assert not model.training
            assert gates_of(model).hard_units("mlp").tolist() == [1, 1, 1]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert model.training is training
    assert gates_of(model).rounded is None
    assert gates_of(model).hard_units("mlp").tolist() != [1, 1, 1]
