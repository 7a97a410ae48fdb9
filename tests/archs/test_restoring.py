"""What holds for a while is put back as it was, even after an error."""

import contextlib
import copy

import pytest
import torch
from helpers.laws import batch_for, tiny
from helpers.tiny import tiny_llama
from torch import nn
from transformers import BertForMaskedLM, LlamaForCausalLM, ViTForImageClassification

from hf_dms.archs.restoring import evaluating, in_precision, restoring


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_every_module_gets_the_mode_back_that_it_had(error):
    first, second = tiny_llama().train(), tiny_llama()
    first.model.norm.eval()
    second.lm_head.train()
    before = [module.training for model in (first, second) for module in model.modules()]
    with contextlib.suppress(RuntimeError), evaluating(first, second):
        assert not any(module.training for model in (first, second) for module in model.modules())
        if error:
            raise error
    assert [module.training for model in (first, second) for module in model.modules()] == before


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_attributes_of_a_module_itself_are_put_back_or_taken_off(error):
    plain, wrapped = nn.Linear(1, 1), nn.Linear(1, 1)
    mine = wrapped.forward = wrapped.forward
    before = [dict(vars(module)) for module in (plain, wrapped)]
    with contextlib.suppress(RuntimeError), restoring([plain, wrapped], "forward", "other"):
        plain.forward = plain.other = wrapped.forward = len
        if error:
            raise error
    assert [vars(module) for module in (plain, wrapped)] == before
    with restoring([wrapped]):
        del wrapped.forward
    assert wrapped.forward is mine


# ---- float32 ----
CLASSES = (LlamaForCausalLM, BertForMaskedLM, ViTForImageClassification)


def tensors_of(model):
    return {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_model_in_float32_computes_what_its_copy_in_float32_does_and_is_itself_again(cls, dtype):
    model = tiny(cls, dtype=dtype)
    model.to(dtype)  # buffers too
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in batch_for(model).items()}
    before = tensors_of(model)
    expected = copy.deepcopy(model).float()(**inputs).logits
    with in_precision(model, torch.float32), torch.no_grad():
        found = model(**inputs).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert tensors_of(model) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_one_layer_at_a_time_is_in_float32():
    model, seen = tiny_llama(dtype=torch.bfloat16), []

    def look(*_):
        seen.append([{parameter.dtype for parameter in layer.parameters()} for layer in model.model.layers])

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    with in_precision(model, torch.float32), torch.no_grad():
        model(**batch_for(model))
    half, whole = {torch.bfloat16}, {torch.float32}
    assert seen == [[whole, half, half], [half, whole, half], [half, half, whole]]


def test_a_model_is_itself_again_after_an_error_in_a_layer():
    model = tiny_llama(dtype=torch.bfloat16)
    before = tensors_of(model)
    model.model.layers[1].mlp.forward = None
    with pytest.raises(TypeError), in_precision(model, torch.float32):
        model(**batch_for(model))
    assert tensors_of(model) == before


def test_products_are_not_rounded_meanwhile():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with in_precision(tiny_llama(dtype=torch.bfloat16), torch.float32):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
