"""The tensors of a checkpoint's files, read from the headers alone."""

import pytest
from helpers.laws import tiny
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, ResNetForImageClassification

from hf_dms.checkpoint.stored import missing_weights


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (ResNetForImageClassification, ("running_var", "num_batches_tracked", "classifier.1.bias")),
        (BertForMaskedLM, ("layer.0.output.dense",)),
    ],
)
def test_missing_is_what_transformers_calls_missing(cls, words, tmp_path):
    model = tiny(cls)
    model.save_pretrained(tmp_path)
    assert missing_weights(tmp_path, model) == []
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not any(word in name for word in words)}
    save_file(kept, file, metadata={"format": "pt"})
    _, found = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"]
    assert set(missing_weights(tmp_path, model)) == set(found["missing_keys"])
