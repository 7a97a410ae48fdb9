"""What holds for a while is put back as it was, even after an error."""

import contextlib

import pytest
from helpers.tiny import tiny_llama
from torch import nn

from hf_dms.archs.restoring import evaluating, restoring


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
