"""Pipeline np searches random weights, and refuses loaded ones."""

import pytest
from helpers.tiny import TINY
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer, HfDmsError


def trainer(model, folder, pipeline):
    arguments = TrainingArguments(output_dir=str(folder), max_steps=4, use_cpu=True, report_to="none")
    return DMSTrainer(model=model, args=arguments, dms_config=DMSConfig(target=0.7, warmup_steps=1, pipeline=pipeline))


def test_loaded_weights_are_no_random_ones(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    trainer(model, tmp_path, "np")
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(tmp_path / "dense")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(
        HfDmsError, match=r"dms\.pipeline np searches a model with random weights, and this one was loaded"
    ):
        trainer(loaded, tmp_path, "np")
    trainer(loaded, tmp_path, "p")
    partly = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", num_labels=2)  # a new head
    with pytest.raises(HfDmsError, match="Use pipeline p, which trains loaded weights, or p-, which keeps them"):
        trainer(partly.double(), tmp_path, "np")
