"""transformers' own tests of a model, run on per-layer classes and on the stock ones. Not part of `make test`.

    TRANSFORMERS_SOURCE=path python -m pytest -q -W default -o addopts= tests/helpers/run_model_mixins.py

They need the package `parameterized` and transformers' sources in the installed version: a checkout, or the source
archive unpacked, which lacks the tests of generation and of export (they have not been run on per-layer classes). A
test that fails for the stock class too says nothing about the per-layer one. With transformers 5.23 everything passes
but `test_model_get_set_embeddings` of both ViTs, whose embeddings are no `nn.Embedding`.
"""

import copy
import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import transformers
from helpers.laws import batch_for, tiny
from helpers.tiny import search_, tiny_llama
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    ViTForImageClassification,
    ViTModel,
)

from hf_dms import DMSConfig, attach_, prune
from hf_dms.cut.modeling_dms import dms_model_class

if "TRANSFORMERS_SOURCE" not in os.environ:
    pytest.skip("TRANSFORMERS_SOURCE must name a folder of transformers' sources", allow_module_level=True)
sys.path.insert(0, os.environ["TRANSFORMERS_SOURCE"])


def mixin_if_there(module, name):
    """A mixin of transformers' tests; an empty one where the sources lack its folder."""
    if not (Path(os.environ["TRANSFORMERS_SOURCE"]) / module.replace(".", "/")).with_suffix(".py").is_file():
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], name, type(name, (), {}))
    return getattr(importlib.import_module(module), name)


mixin_if_there("tests.exporters.test_export", "ExportTesterMixin")  # test_modeling_common imports it
GenerationTesterMixin = mixin_if_there("tests.generation.test_utils", "GenerationTesterMixin")
common = importlib.import_module("tests.test_modeling_common")

FAMILIES = {
    "Llama": (LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification),
    "Bert": (BertForMaskedLM, BertModel, BertForSequenceClassification),
    "ViT": (ViTForImageClassification, ViTModel),
}
transformers.utils.logging.set_verbosity_warning()  # some tests check the log
stock_names = common.get_values


def names_in(mapping):
    """Class names by which the mixins choose labels: those of a mapping of transformers, and of our classes."""
    return [prefix + name for name in stock_names(mapping) for prefix in ("", "Dms")]


common.get_values = names_in


class Tester:
    """The tester that the mixins expect for a model: its sizes, a config and inputs."""

    is_training = True

    def __init__(self, model):
        self.config = type(model.config).from_dict(model.config.to_dict())  # without an attention implementation
        self.inputs = batch_for(model)
        self.batch_size, self.seq_length = model.base_model(**self.inputs)[0].shape[:2]
        self.num_hidden_layers, self.hidden_size = model.config.num_hidden_layers, model.config.hidden_size
        self.num_masks = self.mask_length = self.seq_length - 1  # of an image: all but the class token
        self.num_attention_heads = model.config.per_layer_config[0].num_attention_heads

    def prepare_config_and_inputs_for_common(self):
        return copy.deepcopy(self.config), copy.deepcopy(self.inputs)


def dense(family):
    """A tiny model with as many layers as transformers allows its tests."""
    head = FAMILIES[family][0]
    return tiny_llama(head, num_hidden_layers=2) if family == "Llama" else tiny(head, num_hidden_layers=2)


def per_layer(family):
    """A tiny model whose layers differ in heads and MLP width."""
    model = dense(family)
    attach_(model, DMSConfig(target=0.8, layout="per_layer", prune=("kv" if family == "Llama" else "heads", "mlp")))
    search_(model, seed=1)
    pruned = prune(model, inputs=batch_for(model))
    assert pruned.config.is_heterogeneous
    return pruned


def case_of(model, classes):
    """The test case of the classes that a model's config and inputs fit."""

    def setUp(self):
        self.model_tester = Tester(model)

    mixins = (common.ModelTesterMixin, *([GenerationTesterMixin] if model.can_generate() else []))
    has_tokens = "input_ids" in Tester(model).inputs
    namespace = {"setUp": setUp, "all_model_classes": classes, "test_resize_embeddings": has_tokens}
    return type(type(model).__name__, (*mixins, unittest.TestCase), namespace)


for family, heads in FAMILIES.items():
    globals()[f"TestStock{family}"] = case_of(dense(family), heads)
    globals()[f"TestPerLayer{family}"] = case_of(per_layer(family), tuple(map(dms_model_class, heads)))
