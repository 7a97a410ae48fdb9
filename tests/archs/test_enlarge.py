"""Larger configs: every architecture has stock ones with its sizes multiplied, and says why where it has not."""

import pytest
import torch
import transformers
from helpers.laws import SIZES, batch_for, tiny
from helpers.tiny import TINY
from transformers import AutoModel, BertConfig, LlamaConfig, ResNetConfig, ViTConfig

from hf_dms import DMSConfig, HfDmsError, attach_, fresh_weights_, prune, supernet
from hf_dms.archs.bind import bind
from hf_dms.archs.enlarge import enlarged_config
from hf_dms.archs.registry import ARCHS, spec_for
from hf_dms.archs.stock import held_by_fixed
from hf_dms.gating.attach import gates_of

BASIC = SIZES["resnet"] | dict(layer_type="basic", embedding_size=8, hidden_sizes=[8, 12, 16])
NAMES = [*(name for name in SIZES if not ARCHS[name].per_layer_only), "resnet-basic"]


def model_of(name):
    family, _, basic = name.partition("-") if name == "resnet-basic" else (name, "", "")
    cls = AutoModel._model_mapping[transformers.CONFIG_MAPPING[family]]
    return tiny(cls, **(BASIC if basic else {}))


def bound_of(model):
    return bind(spec_for(model.config), model)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_that_can_be_pruned_is_multiplied_and_the_result_is_a_stock_model(name, tmp_path):
    model = model_of(name)
    config = enlarged_config(model.config, width=2, depth=1.5)
    larger = type(model)._from_config(config)
    before, after = bound_of(model), bound_of(larger)
    for dim in before.spec.dims:
        units = before.sizes.get(dim.name)
        wanted = {"depth": int(1.5 * (units or 0) + 0.5), "fixed": units}.get(dim.scope, 2 * (units or 0))
        wanted = units if dim.name in held_by_fixed(before.spec) else wanted
        assert after.sizes.get(dim.name) == (None if units is None else wanted), dim.name
    larger.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert bound_of(reloaded).sizes == after.sizes
    factor = 1.2 if held_by_fixed(before.spec) else 2  # a part of the network stays
    assert sum(p.numel() for p in reloaded.parameters()) > factor * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "convnext", "resnet", "resnet-basic", "smollm3"])
@pytest.mark.parametrize(("layout", "resource"), [("uniform", "macs"), ("uniform", "params"), ("per_layer", "params")])
def test_a_cut_supernet_costs_what_the_original_does_at_most(name, layout, resource):
    model = model_of(name)
    dms = DMSConfig(target=1.0, resource=resource, sequence_length=7, layout=layout, pipeline="np")
    network, request = supernet(model, dms, width=2, depth=1.5)
    attach_(network, request)

    def cost(of):
        if resource == "params":
            return sum(p.numel() for p in of.parameters())
        attach_(of, DMSConfig(target=1.0, resource=resource, sequence_length=7, layout="per_layer"))
        return gates_of(of).dense_resource

    budget = cost(model)
    assert gates_of(network).dense_resource > 1.6 * budget
    with pytest.warns(UserWarning, match="no search has run"):
        pruned = prune(network, inputs=batch_for(network))
    assert 0.8 * budget < cost(pruned) <= budget


def test_the_original_s_own_shape_fits_its_budget():
    model = model_of("llama")
    for factor in (1.0, 1 / 3, 0.7):
        _, request = supernet(model, DMSConfig(target=factor, pipeline="np"), width=3, depth=2)
        network = type(model)._from_config(enlarged_config(model.config, 3, 2))
        attach_(network, request)
        budget = request.target * gates_of(network).dense_resource
        assert budget >= factor * sum(p.numel() for p in model.parameters())
        assert budget < factor * sum(p.numel() for p in model.parameters()) + 1


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "dinov2", "convnext", "convnextv2", "resnet", "resnet-basic"])
def test_fresh_weights_are_those_of_the_seed_and_nothing_of_the_old_ones_stays(name, layout):
    model = model_of(name)  # whose weights, norms and statistics are no layer's first ones
    with pytest.warns(UserWarning, match="no search has run"):
        pruned = prune(model, DMSConfig(target=0.8, layout=layout, pipeline="np"), inputs=batch_for(model))
    old = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    state = torch.get_rng_state()
    fresh_weights_(pruned, seed=3)
    fresh = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.isfinite().all() for tensor in fresh.values())
    kept = [name for name in old if torch.equal(old[name], fresh[name]) and "num_batches" not in name]
    assert kept == []
    fresh_weights_(pruned, seed=3)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in pruned.state_dict().items())
    fresh_weights_(pruned, seed=4)
    assert any(not torch.equal(fresh[name], tensor) for name, tensor in pruned.state_dict().items())


def test_only_what_the_request_prunes_grows():
    model = tiny(transformers.LlamaModel)
    request = dict(pipeline="np", target=0.9, prune=("mlp", "layers"))
    larger, _ = supernet(model, DMSConfig(**request), width=2, depth=2)
    assert (larger.config.intermediate_size, larger.config.num_hidden_layers) == (40, 6)
    assert larger.config.hidden_size == model.config.hidden_size
    larger, _ = supernet(model, DMSConfig(**request, protect={"dims": ["layers"]}), width=2, depth=2)
    assert larger.config.num_hidden_layers == model.config.num_hidden_layers
    stages = model_of("convnext")
    larger, _ = supernet(stages, DMSConfig(pipeline="np", target=0.9, prune=("mlp", "hidden1", "hidden")), width=2)
    assert larger.config.hidden_sizes == [12, 16, 20]
    assert larger.config.depths == stages.config.depths


def test_a_pattern_of_layers_goes_on():
    model = tiny(transformers.Gemma2Model)
    assert enlarged_config(model.config, 2, 2).layer_types == [*model.config.layer_types, *model.config.layer_types]
    assert enlarged_config(tiny(transformers.SmolLM3Model).config, 1, 5 / 3).no_rope_layers == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LlamaConfig(**TINY), dict(width=0.9, depth=1), "supernet.width must be a factor of at least 1, got 0.9"),
        (LlamaConfig(**TINY), dict(width=2, depth="2"), "supernet.depth must be a factor of at least 1, got '2'"),
        (LlamaConfig(**TINY), dict(width=1, depth=1.1), "leave every size of this llama as it is"),
        (BertConfig(), dict(width=2, depth=1, dims=["heads", "mlp"]), "ties hidden to heads, and only one of the two"),
        (ResNetConfig(), dict(width=2, depth=1, dims=["mid0"]), "ties mid0 to reduced0, and only one of the two"),
        (transformers.GPT2Config(), dict(width=2, depth=1), "model type 'gpt2' is not supported"),
    ],
)
def test_what_cannot_be_enlarged_is_an_error(config, options, message):
    with pytest.raises(HfDmsError, match=message):
        enlarged_config(config, **options)


def test_a_supernet_is_for_pipeline_np_and_larger_than_its_target():
    model = AutoModel.from_config(ViTConfig(**SIZES["vit"]))
    with pytest.raises(HfDmsError, match=r"A supernet has random weights, and dms\.pipeline is p,"):
        supernet(model, DMSConfig(target=0.5), width=2)
    with pytest.raises(HfDmsError, match=r"dms\.target = 1M means 1M params, and the supernet has 0\.0"):
        supernet(model, DMSConfig(target="1M", pipeline="np"), width=2)


def test_the_same_seed_gives_the_same_supernet_and_the_generator_stays():
    model = model_of("resnet")
    dms, state = DMSConfig(target=1.0, pipeline="np"), torch.get_rng_state()
    first, again, other = (supernet(model, dms, width=2, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(network.parameters()) for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
