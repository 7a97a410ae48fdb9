"""Models without weights, and models whose embeddings are not tied though their config says so."""

import pytest
import torch
from helpers.laws import tiny
from helpers.tiny import relative_difference, search_, tiny_llama, token_batch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForMaskedLM, LlamaForCausalLM, LlamaModel

from hf_dms import DMSConfig, attach_, plan_of, prune, save_pruned
from hf_dms.archs.skeleton import config_as_tied, skeleton, untied_names
from hf_dms.checkpoint.stream import prepare_cut, write_cut
from hf_dms.cut.plan import plan_to_json
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import gates_of

SAYS = "tie_word_embeddings is true in .*lm_head.weight is .*Both are kept and counted"


def merged(folder):
    """A Llama as some merges leave it: a tied config, and a file with another output embedding."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(33, 24, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    assert model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    return model


# ---- skeletons ----
def test_a_skeleton_has_the_shapes_and_ties_of_its_class_and_no_weights():
    model = tiny_llama(tie_word_embeddings=True)
    config, state = model.config.to_dict(), torch.get_rng_state()
    found = skeleton(LlamaForCausalLM, model.config, torch.bfloat16)
    assert {name: p.shape for name, p in found.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {(p.device.type, p.dtype) for p in found.parameters()} == {("meta", torch.bfloat16)}
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is tied ----
@pytest.mark.parametrize("model", [tiny_llama(), tiny_llama(tie_word_embeddings=True), tiny_llama(LlamaModel)])
def test_a_model_that_is_tied_as_its_config_says_keeps_its_config(model):
    assert untied_names(model) == []
    assert config_as_tied(model).to_dict() == model.config.to_dict()


def test_embeddings_that_are_two_tensors_count_as_two_whatever_the_config_says(tmp_path):
    model = merged(tmp_path)
    assert untied_names(model) == ["lm_head.weight"]
    assert config_as_tied(model).tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True
    with pytest.warns(UserWarning, match=SAYS):
        attach_(model, DMSConfig(target=0.8))
    numel = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("dms_gates."))
    assert gates_of(model).dense_resource == numel


@pytest.mark.parametrize("layout", ["uniform", "per_layer", "padded"])
def test_a_cut_and_its_reload_keep_both_embeddings(layout, tmp_path):
    model = merged(tmp_path / "dense")
    with pytest.warns(UserWarning, match=SAYS):
        attach_(model, DMSConfig(target=0.8, layout=layout))
    search_(model)
    dense = gates_of(model).dense_resource
    pruned = prune(model, inputs=token_batch())
    assert pruned.config.tie_word_embeddings is False
    assert not torch.equal(pruned.lm_head.weight, pruned.model.embed_tokens.weight)
    assert layout == "padded" or pruned.num_parameters() <= 0.8 * dense
    save_pruned(pruned, tmp_path / "cut")
    reloaded = type(pruned).from_pretrained(tmp_path / "cut")
    assert torch.equal(reloaded.lm_head.weight, pruned.lm_head.weight)


def test_a_streamed_cut_keeps_both_embeddings(tmp_path):
    model = merged(tmp_path / "dense")
    with pytest.warns(UserWarning, match=SAYS):
        attach_(model, DMSConfig(target=0.8))
    search_(model)
    plan = plan_to_json(plan_of(model), gates_of(model).attachment.bound, "uniform")
    (tmp_path / "dms_plan.json").write_text(plan)
    with pytest.warns(UserWarning, match=SAYS):
        job = prepare_cut(tmp_path / "dense", tmp_path)
    (tmp_path / "out").mkdir()
    pruned = prune(model, inputs=token_batch())
    counts = write_cut(job, tmp_path / "dense", tmp_path / "out")
    assert counts == {"dense": gates_of(model).dense_resource, "pruned": pruned.num_parameters()} | {
        "kept": pruned.num_parameters()
    }
    loaded = type(pruned).from_pretrained(tmp_path / "out")
    assert relative_difference(outputs_of(loaded, token_batch()), outputs_of(pruned, token_batch())) < 1e-5


def test_a_streamed_masked_language_model_gets_the_bias_that_its_file_holds_once(tmp_path):
    tiny(BertForMaskedLM).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    model = tiny(BertForMaskedLM)
    attach_(model, DMSConfig(target=0.8, prune=("mlp",)))
    (tmp_path / "dms_plan.json").write_text(plan_to_json(plan_of(model), gates_of(model).attachment.bound, "uniform"))
    with pytest.warns(UserWarning, match="cls.predictions.decoder.weight is another tensor"):
        job = prepare_cut(tmp_path / "dense", tmp_path)
    (tmp_path / "out").mkdir()
    write_cut(job, tmp_path / "dense", tmp_path / "out")
    loaded, info = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.cls.predictions.decoder.bias, model.cls.predictions.bias)
    assert torch.equal(loaded.cls.predictions.decoder.weight, tensors["cls.predictions.decoder.weight"])


def test_a_model_of_which_only_some_ties_hold_is_an_error_that_says_which():
    model = tiny(BertForMaskedLM)
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    message = (
        "'cls.predictions.decoder.weight' is a tensor of its own, while 'cls.predictions.*bias' is tied. Give it a"
    )
    with pytest.raises(ValueError, match=message):
        attach_(model, DMSConfig(target=0.8, prune=("mlp",)))
    decoder.bias = nn.Parameter(decoder.bias.detach().clone())
    with pytest.warns(UserWarning, match="tie_word_embeddings is true"):
        attach_(model, DMSConfig(target=0.8, prune=("mlp",)))
