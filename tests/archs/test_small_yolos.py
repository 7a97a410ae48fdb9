"""A small YOLOS starts with weights that tell places and detection tokens apart, and with stock code."""

import pytest
import torch
from torch.nn import functional as F
from transformers import YolosForObjectDetection

from hf_dms.archs.small_yolos import small_yolos, waves

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_yolos(32, ["cat", "dog"], patch_size=8, cells=2, **SIZES).eval()


def test_it_is_stock_and_reloads(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, pixels = YolosForObjectDetection.from_pretrained(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = model(pixel_values=pixels)
        assert torch.equal(loaded(pixel_values=pixels).logits, outputs.logits)
    assert (outputs.pred_boxes.shape, model.config.id2label) == ((2, 4, 4), {0: "cat", 1: "dog"})


def test_each_detection_token_is_nearest_to_the_patches_of_its_cell(model):
    positions = model.vit.embeddings.position_embeddings[0].detach()
    patches, tokens = positions[1:17], positions[17:]
    alike = F.cosine_similarity(tokens[:, None], patches[None], dim=-1).view(4, 4, 4)
    for token, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[row : row + 2, column : column + 2] = True
        assert alike[token][inside].min() > alike[token][~inside].max()


def test_a_black_patch_is_its_place_alone(model):
    embeddings = model.vit.embeddings
    with torch.no_grad():
        found = embeddings(torch.zeros(1, 3, 32, 32))
    assert torch.equal(found[0, 1:17], embeddings.position_embeddings[0, 1:17])
    assert not torch.equal(found[0, 17], found[0, 18])


def test_waves_by_hand():
    found = waves(torch.tensor([0.0, 1.0]), 4)
    sin, cos = torch.tensor(1.0).sin(), torch.tensor(1.0).cos()
    assert torch.allclose(found, torch.tensor([[0, 1, 0, 1], [sin, cos, 0, 1], [0, 1, sin, cos], [sin, cos, sin, cos]]))
