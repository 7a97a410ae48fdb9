"""DeiT: ViT with a second token in front, for distillation, and a head that reads both."""

from dataclasses import replace

from .spec import Dim, with_dims
from .vit import VIT, num_patches

DEIT = replace(
    VIT,
    model_type="deit",
    dims=with_dims(VIT.dims, Dim("tokens", lambda config: num_patches(config) + 2)),
    params=VIT.params | {"embeddings.distillation_token": "one one hidden"},
    heads=VIT.heads
    | {
        "ForImageClassificationWithTeacher": {
            "cls_classifier.weight": "label hidden @ 1",
            "cls_classifier.bias": "label",
            "distillation_classifier.weight": "label hidden @ 1",
            "distillation_classifier.bias": "label",
        }
    },
)
