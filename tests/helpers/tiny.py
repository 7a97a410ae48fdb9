"""A tiny Llama, gates as a search would leave them, a tiny dataset. CPU, no network."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, initialization

from hf_dms import DMSConfig, attach_
from hf_dms.archs.bind import BoundSpec
from hf_dms.gates import Gates
from hf_dms.gating.attach import gates_of
from hf_dms.gating.rounding import round_sizes

TINY = dict(
    vocab_size=33,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_labels=3,
)


def tiny_llama(
    cls: type = LlamaForCausalLM, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "sdpa", **overrides
) -> PreTrainedModel:
    """A Llama whose weights are drawn from normal(0, 0.3), its norms' from normal(1, 0.3): no unit is like another."""
    config = LlamaConfig(**(TINY | overrides))
    with initialization.no_init_weights():  # a third of the time; all weights are drawn below
        model = cls._from_config(config, attn_implementation=attn).eval()
    model.tie_weights()  # the context leaves it out
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.normal_(mean, 0.3, generator=generator)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # so that generation always has the full length
    return model.to(dtype)


@torch.no_grad()
def search_(model: PreTrainedModel, seed: int = 0, ratios: tuple[float, float] = (0.1, 0.8)) -> None:
    """Leave the gates of a model as a search would: past the warm-up, with random importance and ratios."""
    gates = gates_of(model)
    generator = torch.Generator().manual_seed(seed)
    for name in gates.dims:
        gates.raw_importance(name).copy_(torch.rand(gates.raw_importance(name).shape, generator=generator))
    low, high = ratios
    gates.prune_ratio.copy_(low + (high - low) * torch.rand(gates.prune_ratio.shape, generator=generator))
    gates.clamp_ratios_()
    gates.num_updates = max(gates.schedule.warmup_steps, 1)


def token_batch(batch: int = 2, length: int = 7, seed: int = 0, vocab: int = 33) -> dict[str, Tensor]:
    """Random tokens, none of them the padding token."""
    ids = torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest |difference| relative to the largest magnitude."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))  # all may be 0 after a ReLU


class Tokens(torch.utils.data.Dataset):
    """Random token sequences of equal length, as a causal language model's examples."""

    def __init__(self, num_examples: int = 32, length: int = 8, seed: int = 0) -> None:
        self.ids = token_batch(num_examples, length, seed)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def lowest_target(gates: Gates, bound: BoundSpec, config: DMSConfig, model_config: PreTrainedConfig) -> float:
    """The lowest target that can be met, read from the error for an impossible target."""
    with pytest.raises(ValueError, match="cannot be reached") as error:
        round_sizes(gates, bound, dataclasses.replace(config, target=1e-9), model_config)
    found = re.search(r"Raise the target to at least ([\d.]+),", str(error.value))
    return float(found[1]) if found else 1.0  # no dim has room


def trace(model: nn.Module) -> tuple:
    """Everything in a model that gates could change and not restore."""
    modules = dict(model.named_modules())
    hooks = {
        name: [list(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        for name, module in modules.items()
    }
    attributes = {name: (type(module), sorted(vars(module))) for name, module in modules.items()}
    parameters = {name: (id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)}
    config = model.config.to_dict() if hasattr(model, "config") else None
    return hooks, attributes, parameters, config, list(model.state_dict())


def untouched(model: object, message: str, function: Callable = attach_, **options) -> None:
    """Assert that a function fails with a message and leaves the model as it was."""
    before = trace(model) if isinstance(model, nn.Module) else None
    with pytest.raises(ValueError, match=message):
        function(model, DMSConfig(**({"target": 0.5} | options)))
    assert before is None or trace(model) == before
