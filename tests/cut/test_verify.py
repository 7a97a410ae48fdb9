"""The check that two models give the same outputs on one batch."""

import peft
import pytest
import torch
from helpers.laws import tiny
from helpers.tiny import search_, tiny_llama, token_batch
from transformers import BertModel, LlamaForQuestionAnswering, LlamaModel

from hf_dms import DMSConfig, attach_, prune
from hf_dms.cut.verify import (
    TOLERANCE,
    all_outputs_of,
    can_be_upcast,
    check_same,
    dummy_inputs,
    hard_masked,
    outputs_of,
)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_is_compared_in_float32(dtype):
    """A weight with an error of 1 % would pass any tolerance that half precision needs."""
    model, other = (tiny_llama(dtype=dtype) for _ in range(2))
    assert check_same(model, other, token_batch(), ("first", "second")) == 0
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[3] *= 1.01
    with pytest.raises(VerificationError, match=r"logits has relative difference .* tolerance 1e-04 for torch.float32"):
        check_same(model, other, token_batch(), ("first", "second"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_what_the_cut_rounds_is_compared_in_its_own_precision():
    model = tiny_llama(dtype=torch.bfloat16)
    assert can_be_upcast(model)
    model.model.norm.float()
    assert not can_be_upcast(model)
    model.model.norm.bfloat16()
    model.config._attn_implementation = "flash_attention_2"
    assert not can_be_upcast(model)
    lora = peft.LoraConfig(target_modules=["q_proj"])
    assert not can_be_upcast(peft.inject_adapter_in_model(lora, tiny_llama(dtype=torch.bfloat16)))


def test_every_output_is_compared():
    model, other = tiny(BertModel), tiny(BertModel)
    with torch.no_grad():
        other.pooler.dense.weight[0] += 0.1
    assert set(all_outputs_of(model, token_batch())) == {"last_hidden_state", "pooler_output"}
    with pytest.raises(VerificationError, match="what the first model does: pooler_output has relative difference"):
        check_same(model, other, token_batch(), ("first", "second"))
    other = tiny(BertModel)
    other.pooler = None
    with pytest.raises(VerificationError, match=r"pooler_output is missing, expected \(2, 24\)"):
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


def ruined_llama(shift=0):
    """A model in which large sums of one layer cancel. Its MLP units are rotated, which changes no output."""
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for reader in (mlp.gate_proj, mlp.up_proj):
            reader.weight[1] = reader.weight[0]
            reader.weight.copy_(reader.weight.roll(shift, 0))
        mlp.down_proj.weight[:, 0] += 1e5
        mlp.down_proj.weight[:, 1] -= 1e5
        mlp.down_proj.weight.copy_(mlp.down_proj.weight.roll(shift, 1))
    return model


def test_float64_decides_where_the_order_of_sums_shows_in_float32():
    model, other = ruined_llama(), ruined_llama(shift=9)
    found = check_same(model, other, token_batch(), ("first", "second"))
    assert found < 1e-5
    assert {parameter.dtype for parameter in (*model.parameters(), *other.parameters())} == {torch.float32}
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[:, 3] *= 1.01
    with pytest.raises(VerificationError, match=r"relative difference .* tolerance 1e-04 for torch.float32"):
        check_same(model, other, token_batch(), ("first", "second"))


def test_a_masked_model_is_itself_again_after_float64(monkeypatch):
    model = ruined_llama()
    attach_(model, DMSConfig(target=0.6))
    search_(model)
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)  # so that float64 decides
    tensors = {name: id(tensor) for name, tensor in model.named_parameters()}
    prune(model, inputs=token_batch())
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == tensors
