"""A per-layer folder of each family, for test_per_layer_models.py and test_per_layer_adapters.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers.laws import batch_for, searched, tiny
from helpers.tiny import TINY, tiny_llama
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.image_utils import load_image

from hf_dms import prune
from hf_dms.archs.registry import ARCHS
from hf_dms.archs.spec import ArchSpec
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.verify import outputs_of


class Family(NamedTuple):
    """A stock class, the Auto class that loads its checkpoints, and the task of its pipeline."""

    head: type
    auto: type
    auto_processor: type
    task: str
    options: dict[str, Any]


FAMILIES = {
    "llama": Family(
        head=LlamaForCausalLM,
        auto=AutoModelForCausalLM,
        auto_processor=AutoTokenizer,
        task="text-generation",
        options={"max_new_tokens": 5, "do_sample": False, "return_tensors": True},
    ),
    "bert": Family(
        head=BertForSequenceClassification,
        auto=AutoModelForSequenceClassification,
        auto_processor=AutoTokenizer,
        task="text-classification",
        options={"top_k": None},
    ),
    "vit": Family(
        head=ViTForImageClassification,
        auto=AutoModelForImageClassification,
        auto_processor=AutoImageProcessor,
        task="image-classification",
        options={"top_k": None},
    ),
}


@dataclass
class Case:
    """A pruned model and the folder that holds it.

    Attributes:
        family: how to load it.
        spec: its description.
        model: the model that `prune` returned.
        folder: the folder where it was saved, with its processor.
        processor: its tokenizer or image processor.
        example: a text, or the path of an image.
        inputs: random arguments of a forward pass of two examples.
        logits: the model's logits for them.
        labels: labels for its loss.
    """

    family: Family
    spec: ArchSpec
    model: PreTrainedModel
    folder: Path
    processor: Any
    example: str
    inputs: dict[str, Tensor]
    logits: Tensor
    labels: Tensor

    def load(self, **options: Any) -> PreTrainedModel:
        return self.family.auto.from_pretrained(self.folder, **options)

    def layers(self, model: PreTrainedModel) -> torch.nn.Module:
        return model.base_model.get_submodule(self.spec.layers)

    def run(self, model: PreTrainedModel) -> Tensor:
        """The logits of a model of any dtype for `inputs`."""
        return outputs_of(model, {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in self.inputs.items()})

    def encode(self, processor: Any) -> dict[str, Tensor]:
        """The inputs that a processor makes of `example`."""
        example = load_image(self.example) if self.is_image else self.example
        return dict(processor(example, return_tensors="pt"))

    @property
    def is_image(self) -> bool:
        return self.family.task == "image-classification"


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models are of one class and hold equal tensors of equal dtypes."""
    first, second = model.state_dict(), other.state_dict()
    if type(model) is not type(other) or first.keys() != second.keys():
        return False
    return all(t.dtype == second[name].dtype and torch.equal(t, second[name]) for name, t in first.items())


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of letters, with as many words as the tiny models."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(ord("a"), ord("z") + 1))]
    words += [str(number) for number in range(TINY["vocab_size"] - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def per_layer(name: str) -> PreTrainedModel:
    """A pruned model whose layers differ in heads and MLP width, narrower than the dense one."""
    head, overrides = FAMILIES[name].head, {"num_channels": 3} if name == "vit" else {}
    model = tiny_llama(head) if name == "llama" else tiny(head, **overrides)
    searched(model, layout="per_layer", prune=("kv" if name == "llama" else "heads", "mlp", "hidden"))
    return prune(model, inputs=batch_for(model))


def make_case(name: str, folder: Path) -> Case:
    """Prune a tiny model and save it."""
    model, is_image = per_layer(name), name == "vit"
    assert model.config.is_heterogeneous
    inputs, example = batch_for(model), "a b c d"
    processor = image_processor() if is_image else word_tokenizer()
    save_pruned(model, folder, inputs=inputs, processor=processor)
    if is_image:
        example = str(folder.with_suffix(".png"))
        pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(example)
    labels = inputs["input_ids"] if name == "llama" else torch.tensor([0, 1])
    spec, logits = ARCHS[name], outputs_of(model, inputs)
    return Case(FAMILIES[name], spec, model, folder, processor, example, inputs, logits, labels)
