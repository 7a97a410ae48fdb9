"""A few inputs with what the dense and the pruned model make of each: continuations of a prompt, or predictions.

They are `samples` in dms_report.json: `input` (text, or a small picture as a data URI), for classifiers `label` and
`probabilities`, and `outputs`, one for each model.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..tasks.data import Examples
from ..tasks.evaluate import evenly_spaced
from .recipe import Recipe

MAX_CHARACTERS = 400  # of a text that is shown
THUMBNAIL = 64  # pixels, the longer side of a picture that is shown


@torch.no_grad()
def add_outputs_(
    samples: list[dict[str, Any]], name: str, model: PreTrainedModel, processor: Any, recipe: Recipe, examples: Examples
) -> list[dict[str, Any]]:
    """Add what a model makes of each sample, in place.

    Args:
        samples: what `inputs_of` returned.
        name: of the model in the report: dense, or the last step that the pruned one went through.
        model: in evaluation mode.
        processor: its tokenizer or image processor.
        recipe: which samples, and how many new tokens.
        examples: where a classifier's samples are from.

    Returns:
        The samples, for processes that do not run the model.
    """
    if recipe.model.task == "text-generation":
        for sample in samples:
            sample["outputs"][name] = continuation(model, processor, sample["input"], recipe.eval.new_tokens)
    elif samples:
        rows = evenly_spaced(examples.held_out, recipe.eval.samples)
        batch = examples.collate([rows[i] for i in range(len(rows))])
        inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
        probabilities, classes = model(**inputs).logits.float().softmax(-1).max(-1)
        for sample, probability, number in zip(samples, probabilities.tolist(), classes.tolist()):
            sample["outputs"][name] = examples.labels[number]
            sample["probabilities"][name] = round(probability, 4)
    return samples


def inputs_of(processor: Any, recipe: Recipe, examples: Examples) -> list[dict[str, Any]]:
    """The samples of a recipe, without outputs: its prompts, or some held-out examples of a classifier."""
    if recipe.model.task == "text-generation":
        prompts = recipe.eval.prompt if isinstance(recipe.eval.prompt, list) else [recipe.eval.prompt]
        return [{"input": prompt, "outputs": {}} for prompt in prompts if prompt]
    if not recipe.eval.samples:
        return []
    rows = evenly_spaced(examples.held_out, recipe.eval.samples)
    samples = []
    for row in (rows[i] for i in range(len(rows))):
        is_text = recipe.model.task == "text-classification"
        shown = _text(row["input_ids"], processor) if is_text else picture(row["pixel_values"])
        label = examples.labels[int(row["labels"])]
        samples.append({"input": shown, "label": label, "outputs": {}, "probabilities": {}})
    return samples


def continuation(model: PreTrainedModel, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """What a language model makes of a prompt (greedy), prompt included."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    generate: Any = model.generate
    tokens = generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _text(tokens: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def picture(pixels: Tensor) -> str:
    """What a model sees of an image, as a small PNG in a data URI; its colours are stretched over the whole range.

    Args:
        pixels: `[channels, height, width]`, with one or three channels; of others the first is shown.
    """
    from PIL import Image

    pixels = pixels.float()[: 3 if len(pixels) == 3 else 1]
    low, high = pixels.min(), pixels.max()
    levels = ((pixels - low) / (high - low).clamp_min(1e-12) * 255).byte().cpu()
    image = Image.fromarray(levels.permute(1, 2, 0).squeeze(-1).numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
