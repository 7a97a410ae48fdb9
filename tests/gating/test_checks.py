"""A model that cannot have gates gets an error that names the first fault, and is not changed."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import search_, tiny_llama, token_batch, untouched
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_dms import DMSConfig, attach_, prune
from hf_dms.cut.verify import outputs_of

CONFIG = DMSConfig(target=0.7)
compiled = functools.partial(torch.compile, backend="eager")


# ---- what is no plain model ----
@pytest.mark.parametrize("function", [attach_, prune])
@pytest.mark.parametrize("model", [None, "models/llama", LlamaForCausalLM, nn.Linear(2, 2)])
def test_only_transformers_models_are_taken(function, model):
    untouched(
        model, f"{function.__name__} takes a transformers PreTrainedModel, got {type(model).__name__}.$", function
    )


@pytest.mark.parametrize("function", [attach_, prune])
@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_a_wrapped_model_is_told_from_the_model_inside(function, wrap):
    model = wrap(tiny_llama())
    message = f"got {type(model).__name__} around a LlamaForCausalLM. Pass the model inside it, and wrap it afterwards"
    untouched(model, message, function)


def test_a_wrapped_model_with_gates_is_not_taken_for_one_without():
    model = tiny_llama()
    attach_(model, CONFIG)
    search_(model)
    with pytest.raises(ValueError, match=r"prune takes .* got DataParallel around a LlamaForCausalLM"):
        prune(nn.DataParallel(model))


def test_unknown_architectures_are_told_the_known_ones_and_how_to_add_one():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=33))
    untouched(gpt2, "model type 'gpt2' is not supported. Supported: .*llama.* To add one, see docs/new_architecture.md")


# ---- gates that are there already ----
def test_attach_twice_is_an_error():
    model = tiny_llama()
    attach_(model, CONFIG)
    untouched(model, r"has gates already. Take them off with hf_dms.detach_\(model\) first")


@pytest.mark.parametrize("dims", [None, ("layers",)])
def test_a_part_of_a_model_with_gates_and_a_model_around_one_are_refused(dims):
    message = "Modules of this model belong to a model that has gates already: one around it, inside it"
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.7, prune=dims))
    for function in (attach_, prune):
        untouched(model.model, message, function)
    model = tiny_llama()
    attach_(model.model, DMSConfig(target=0.7, prune=dims))
    untouched(model, message)


def test_prune_takes_one_request_only():
    model = tiny_llama()
    attach_(model, CONFIG)
    untouched(model, r"got a dms_config for a model that has gates, which have a request of their own", prune)


def test_prune_twice_gives_the_same_model_twice():
    model = tiny_llama()
    attach_(model, CONFIG)
    search_(model)
    first, second = prune(model).state_dict(), prune(model).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- weights that are not here, or not plain ----
def replaced(model, name, tensor):
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)
    return model


class Packed(nn.Parameter):
    """Parameters as quantisers make them."""


def test_quantised_models_are_refused():
    model = tiny_llama()
    model.is_quantized = True
    untouched(model, "is quantised by an unknown method, whose weights cannot be cut. Load it without")
    packed = replaced(tiny_llama(), "model.layers.1.mlp.up_proj.weight", Packed(torch.zeros(20, 24)))
    untouched(packed, "'model.layers.1.mlp.up_proj.weight' is a Packed, not a whole plain tensor: .* or quantised")


def test_any_parameter_on_the_meta_device_is_an_error():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    untouched(model, "'model.embed_tokens.weight' is on the meta device and has no weights: the model was never loaded")
    model = tiny_llama()
    model.model.layers[2].to("meta")
    untouched(model, "'model.layers.2.self_attn.q_proj.weight' is on the meta device .* Load it with from_pretrained")


def test_offloaded_models_are_refused(tmp_path):
    import accelerate

    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    model = accelerate.dispatch_model(tiny_llama(), devices | {"model.layers": "disk"}, offload_dir=tmp_path)
    untouched(model, r"'model.layers.0.self_attn.q_proj.weight' is on the meta device .* a device_map offloads that")


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_models_are_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    untouched(model, r"'model.embed_tokens.weight' is a DTensor, not a whole plain tensor: the model is sharded \(FSDP")


def test_partitioned_models_are_refused():
    """Parameters as DeepSpeed's ZeRO-3 leaves them between their uses."""
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    untouched(model, "'model.embed_tokens.weight' is a tensor without elements, not a whole .* ZeRO-3")


# ---- another model than its class and config make ----
class OtherNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 20), nn.Linear(20, 24)


def changed(change):
    model = tiny_llama()
    change(model)
    return model


def rename(model):
    model.model.layers[1].mlp = OtherNames()


def wrap(model):
    model.model.layers[1].mlp = compiled(model.model.layers[1].mlp)


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def make_buffer(model):
    module = model.model.layers[0].mlp.up_proj
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)


def resize(model):
    model.model.layers[2].mlp.down_proj = nn.Linear(19, 24, bias=False)


def drop_a_layer(model):
    del model.model.layers[2]


def repeat_a_layer(model):
    model.model.layers[2] = model.model.layers[0]


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"'model.layers.1.mlp.up.weight' has shape \(20, 24\) here, and does not exist in a LlamaForCausalLM"),
        (wrap, r"'model.layers.1.mlp._orig_mod.gate_proj.weight' has shape \(20, 24\) here, and does not exist in a"),
        (parametrize, r"'model.layers.0.mlp.up_proj.parametrizations.weight.original0' has shape \(20, 1\) here, and"),
        (make_buffer, r"'model.layers.0.mlp.up_proj.weight' does not exist here, and has shape \(20, 24\) in a Llama"),
        (resize, r"'model.layers.2.mlp.down_proj.weight' has shape \(24, 19\) here, and has shape \(24, 20\) in a"),
        (drop_a_layer, r"'model.layers.2.self_attn.q_proj.weight' does not exist here, and has shape \(24, 24\) in"),
        (
            repeat_a_layer,
            r"'model.layers.2.self_attn.q_proj.weight' has shape .* tied to 'model.layers.0.self_attn.q_",
        ),
        (tie, r"'lm_head.weight' has shape \(33, 24\) and is tied to 'model.embed_tokens.weight' here, and has shape"),
    ],
)
def test_a_model_changed_by_hand_is_told_from_its_class(change, message):
    untouched(changed(change), message + ".* Put gates on the model as from_pretrained returns it")


def test_a_model_resized_by_transformers_is_taken():
    model = tiny_llama()
    model.resize_token_embeddings(40)
    assert prune_without_search(model).config.vocab_size == 40


def prune_without_search(model):
    with pytest.warns(UserWarning, match="no search has run"):
        return prune(model, CONFIG)


# ---- what bypasses the gates ----
def test_fused_kernels_are_refused():
    model = tiny_llama()
    model._use_kernels = True  # the setter does this if the package `kernels` is installed
    untouched(model, "use_kernels=True replaces norms and MLPs by fused kernels that bypass the gates. Set it off")


def test_reentrant_checkpointing_is_refused_before_and_after():
    model, other = tiny_llama(), tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": True})
    untouched(model, "activation checkpointing with use_reentrant=True, .* Leave it out")
    attach_(other, CONFIG)
    other.activation_checkpointing_enable({"use_reentrant": True})
    outputs_of(other, token_batch())  # nothing is recomputed in evaluation
    with pytest.raises(ValueError, match=r"activation checkpointing with use_reentrant=True, .* Leave it out"):
        other.train()(**token_batch())
    other.activation_checkpointing_enable({"use_reentrant": False})
    other(**token_batch()).logits.sum().backward()


def test_the_model_that_is_built_to_compare_with_changes_nothing():
    model = tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=True)
    config, state = copy.deepcopy(model.config), torch.get_rng_state()
    attach_(model, CONFIG)
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation
    assert torch.equal(torch.get_rng_state(), state)
