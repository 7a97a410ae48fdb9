"""PEFT on per-layer models: every adapter × every use of it. Each adapter takes one training step first.

Prefix tuning is not among them: it gives every layer keys and values of one width.
"""

from dataclasses import dataclass

import pytest
import torch
from helpers.laws import SHIPPED
from helpers.per_layer import FAMILIES, Case, make_case, same_weights
from helpers.tiny import relative_difference
from transformers import PreTrainedModel

from hf_dms.cut.verify import outputs_of

peft = pytest.importorskip("peft")
# peft 0.21 asks for it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEARS = {
    "llama": ["q_proj", "o_proj", "down_proj"],
    "bert": ["query", "attention.output.dense", "intermediate.dense"],
    "vit": ["q_proj", "o_proj", "fc1"],
}
METHODS = {
    "lora": lambda linears: peft.LoraConfig(r=2, target_modules=linears),
    "lora everywhere": lambda linears: peft.LoraConfig(r=2, target_modules="all-linear"),
    "dora": lambda linears: peft.LoraConfig(r=2, target_modules=linears, use_dora=True),
    "loha": lambda linears: peft.LoHaConfig(r=2, target_modules=linears),
    "vera": lambda linears: peft.VeraConfig(r=2, target_modules=linears),  # layers share a projection
    "ia3": lambda linears: peft.IA3Config(target_modules=linears, feedforward_modules=[]),
}


@dataclass
class Tuned:
    """A per-layer model with an adapter after one training step.

    Attributes:
        case: the model without it.
        model: the adapted model.
        fresh: what it computed before the step.
        logits: what it computes.
    """

    case: Case
    model: PreTrainedModel
    fresh: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return make_case(request.param, tmp_path_factory.mktemp(request.param) / "out")


@pytest.fixture(scope="module", params=METHODS)
def tuned(request, case):
    model = peft.get_peft_model(case.load(), METHODS[request.param](LINEARS[case.spec.model_type])).eval()
    fresh = outputs_of(model, case.inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**case.inputs, labels=case.labels).loss.backward()
    optimizer.step()
    return Tuned(case, model.eval(), fresh, outputs_of(model, case.inputs))


def test_a_step_moves_the_adapter_alone(tuned):
    assert relative_difference(tuned.fresh, tuned.case.logits) < SHIPPED
    assert relative_difference(tuned.logits, tuned.case.logits) > SHIPPED
    with tuned.model.disable_adapter():
        assert relative_difference(outputs_of(tuned.model, tuned.case.inputs), tuned.case.logits) < SHIPPED


def test_a_saved_adapter_loads_onto_the_folder(tuned, tmp_path):
    tuned.model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(tuned.case.load(), tmp_path).eval()
    assert relative_difference(outputs_of(again, tuned.case.inputs), tuned.logits) < SHIPPED


def test_a_merged_adapter_is_a_per_layer_model_that_is_saved_as_any_other(tuned, tmp_path):
    adapter = tmp_path / "adapter"
    tuned.model.save_pretrained(adapter)
    merged = peft.PeftModel.from_pretrained(tuned.case.load(), adapter).merge_and_unload().eval()
    assert type(merged) is type(tuned.case.model)
    assert relative_difference(outputs_of(merged, tuned.case.inputs), tuned.logits) < SHIPPED
    merged.save_pretrained(tmp_path / "merged")
    assert same_weights(tuned.case.family.auto.from_pretrained(tmp_path / "merged"), merged)
