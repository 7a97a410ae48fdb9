"""Layout padded is a stock model that computes exactly what the per-layer cut computes.

test_decoders and test_encoders draw this layout too.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.laws import (
    SHIPPED,
    TASKS,
    assert_same,
    batch_for,
    heads_of,
    is_stock,
    macs_by_the_flop_counter,
    masked_cut_reloaded,
    searched,
    tiny,
    written_sizes,
)
from helpers.marks import slow
from helpers.tiny import relative_difference
from transformers import (
    BertForSequenceClassification,
    BertModel,
    Dinov2ForImageClassification,
    ElectraForMaskedLM,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SmolLM3ForCausalLM,
    ViTForImageClassification,
    ViTModel,
)

from hf_dms import DMSConfig, attach_, detach_, prune
from hf_dms.archs.axes import parse_axes
from hf_dms.archs.bind import BoundParam, bind
from hf_dms.archs.registry import spec_for
from hf_dms.archs.spec import Dim, with_dims
from hf_dms.cut.prune import plan_of
from hf_dms.cut.slicing import pad_tensor
from hf_dms.cut.verify import all_outputs_of
from hf_dms.report.numbers import report_table, sizes_and_costs

BERTS = ("bert", "roberta", "distilbert", "electra")
HEADS = (
    *(head for name in ("Llama", "Mistral", "Qwen2", "Qwen3") for head in heads_of(name, "CausalLM", *TASKS)),
    *(head for name in ("Bert", "Roberta", "DistilBert") for head in heads_of(name, *TASKS, "MaskedLM")),
    *(ElectraForMaskedLM, Dinov2ForImageClassification, Gemma2ForCausalLM, SmolLM3ForCausalLM),
    *heads_of("ViT", "ImageClassification"),
    *heads_of("DeiT", "ImageClassification", "ImageClassificationWithTeacher"),
)


def options_for(head):
    """Options of a search with layers of different widths. BERT keeps hidden, which its stock config ties to heads."""
    dims = ("heads", "mlp", "layers") if head.config_class.model_type in BERTS else None
    return {"prune": dims, "protect": {"min": {"layers": 2}}}


@pytest.mark.parametrize(
    "head", [p for _, heads in itertools.groupby(HEADS, lambda head: head.config_class) for p in slow(*heads)]
)
def test_a_padded_model_is_stock_and_computes_what_the_per_layer_cut_does(head, tmp_path):
    model = tiny(head)
    gates, sizes = searched(model, layout="padded", **options_for(head))
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, SHIPPED)
    assert is_stock(pruned)
    assert int(gates.count(written_sizes(gates, sizes, pruned))) == pruned.num_parameters() < model.num_parameters()
    counted = int(gates.count(gates.dense_sizes() | sizes))
    assert counted <= gates.attachment.config.target * gates.dense_resource
    detach_(model)
    _, same_sizes = searched(model, layout="per_layer", **options_for(head))
    assert all(torch.equal(size, sizes[name]) for name, size in same_sizes.items())
    per_layer = prune(model, inputs=batch_for(model))
    assert counted == per_layer.num_parameters() < pruned.num_parameters()
    found, expected = (all_outputs_of(other, batch_for(model)) for other in (pruned, per_layer))
    assert found.keys() == expected.keys()
    assert all(relative_difference(found[name], expected[name]) < SHIPPED for name in expected)


def test_heads_of_a_bert_are_padded_back_to_all_of_them():
    model = tiny(BertModel)
    searched(model, prune=("heads",), layout="padded")
    config = prune(model, inputs=batch_for(model)).config
    assert (config.num_attention_heads, config.hidden_size) == (4, 24)


@pytest.mark.parametrize(
    ("head", "overrides", "ties"),
    [(BertModel, {}, "bert ties hidden to 'heads d'"), (LlamaForCausalLM, {"mlp_bias": True}, "llama ties hidden to")],
)
def test_a_hidden_size_that_no_padding_fits_is_an_error_that_names_per_layer(head, overrides, ties):
    model = tiny(head, **overrides)
    message = rf"layout padded: the stock config of {ties}.* as prune: \[\w+, mlp, layers\], or use layout: per_layer"
    for dims in (None, ("hidden",)):
        with pytest.raises(ValueError, match=message):
            attach_(model, DMSConfig(target=0.9, layout="padded", prune=dims))
    attach_(model, DMSConfig(target=0.9, layout="padded", protect={"dims": ["hidden"]}))


@pytest.mark.parametrize("head", [LlamaForCausalLM, BertForSequenceClassification, ViTForImageClassification])
def test_padding_has_no_gradient_so_training_leaves_it_alone(head):
    model = tiny(head, **({"attention_bias": True, "mlp_bias": True} if head is LlamaForCausalLM else {}))
    searched(model, prune=("kv" if head is LlamaForCausalLM else "heads", "mlp"), layout="padded")
    inputs = batch_for(model)
    pruned = prune(model, inputs=inputs).train()
    labels = inputs["input_ids"] if head is LlamaForCausalLM else torch.tensor([0, 1])
    pruned(**inputs, labels=labels).loss.backward()
    padding = 0
    for parameter in pruned.parameters():
        padding += int((parameter == 0).sum())  # only padding is exactly 0
        assert not parameter.grad[parameter == 0].any()
    assert padding > 0
    assert any(parameter.grad.any() for parameter in pruned.parameters())


def test_zeros_stand_behind_the_kept_units_of_their_own_factor():
    model = tiny(ViTModel)
    bound = bind(spec_for(model.config), model)
    spec = replace(bound.spec, dims=with_dims(bound.spec.dims, Dim("three", "3")))
    params = {"fused": BoundParam(parse_axes("hidden (three heads d)"), layer=0)}
    bound = replace(bound, spec=spec, sizes=bound.sizes | {"three": 3}, params=params)
    kept = torch.rand(24, 3, 2, 6)
    padded = pad_tensor(kept.flatten(1), torch.Size([24, 3 * 4 * 6]), bound, "fused").view(24, 3, 4, 6)
    assert torch.equal(padded[:, :, :2], kept)
    assert not padded[:, :, 2:].any()


def test_the_report_counts_what_is_written_and_what_is_kept_beside_it():
    model = tiny(Qwen2ForCausalLM, attn="eager")
    gates, sizes = searched(model, layout="padded")
    report, pruned = sizes_and_costs(model, plan_of(model), 7), prune(model, inputs=batch_for(model))
    assert report["pruned"]["num_params"] == pruned.num_parameters()
    assert report["pruned"]["macs_per_token"] == macs_by_the_flop_counter(
        pruned, "model", batch_for(pruned, batch=1), 7
    )
    cache = pruned(**batch_for(pruned), use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert report["pruned"]["kv_bytes_per_token"] == cached / (2 * 7)
    assert report["pruned"]["kept_num_params"] == int(gates.count(gates.dense_sizes() | sizes))
    assert (
        f"parameters without padding | {report['dense']['num_params']:,} | {report['pruned']['kept_num_params']:,}"
        in (report_table(report))
    )
    detach_(model)
    searched(model, layout="per_layer")
    per_layer = sizes_and_costs(model, plan_of(model), 7)
    assert "without padding" not in report_table(per_layer)
    for name, count in per_layer["pruned"].items():
        assert report["pruned"][f"kept_{name}"] == count < report["pruned"][name]
