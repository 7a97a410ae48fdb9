"""object-detection: boxes and classes of the objects in each image, measured by COCO's mean average precision."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..archs.inputs import image_shape
from ..errors import HfDmsError
from .average_precision import FOUND, TRUE, average_precision
from .boxes import check_inside, read_boxes, read_categories
from .classification import config_values, load_labelled, sample_rows
from .data import DataConfig
from .evaluate import evenly_spaced
from .found_boxes import found_boxes
from .images import CHECKED, IMAGE_CLASSIFICATION, Preparation, as_image, data_uri, decoded, preparation, undecoded
from .labels import Head
from .sources import Source, load_sources
from .task import Examples, Sample, SampleOptions

NEEDED = ("pycocotools", "scipy")  # for the metric, and for matching boxes in the loss
SHOWN_FROM = 0.5  # a report shows boxes with at least this probability
PICTURE = 160  # pixels of the longer side of a picture with boxes
COLOURS = ("#ff5c5c", "#5cc8ff", "#7dff5c", "#ffd65c", "#d98cff")  # colours of boxes, by number of the class


class BoxedImages(Dataset):
    """Images with the boxes in them as a detector's arguments, decoded and resized on demand.

    Args:
        rows: a `datasets.Dataset` with the undecoded image and its `place` in the source.
        source: their source, for errors.
        config: the `data` section, with the columns of the image and its objects.
        truths: by place in the source, boxes in pixels `[objects, 4]` and numbers of their classes.
        prepare: see `preparation`.
    """

    def __init__(
        self,
        rows: Any,
        source: Source,
        config: DataConfig,
        truths: list[tuple[Tensor, list[int]]],
        prepare: Preparation,
    ) -> None:
        self.rows, self.source, self.config, self.truths, self.prepare = rows, source, config, truths, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch; a DataLoader calls this method if there is one."""
        images, annotations = [], []
        places = self.rows.select_columns(["place"])[list(indices)]["place"]
        for index, place in zip(indices, places):
            images.append(self.checked(index, place))
            objects = zip(self.truths[place][0].tolist(), self.truths[place][1])
            annotations.append({"image_id": place, "annotations": [_as_coco(box, number) for box, number in objects]})
        made = self.prepare(images, annotations=annotations)
        labels = [{key: each[key] for key in ("class_labels", "boxes")} for each in made["labels"]]
        return [{"pixel_values": pixels, "labels": each} for pixels, each in zip(made["pixel_values"], labels)]

    def checked(self, index: int, place: int) -> Any:
        """An image, after a check that its boxes lie inside it."""
        image = decoded(self.rows, index, self.source, self.config.image_column)
        check_inside(self.truths[place][0], image, self.source.cell(place, self.config.objects_column))
        return image


def _as_coco(box: list[float], number: int) -> dict[str, Any]:
    return {"bbox": box, "category_id": number, "area": box[2] * box[3], "iscrowd": 0}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `pixel_values` `[batch, channels, height, width]`, and per image its `class_labels` and `boxes`."""
    return {
        "pixel_values": torch.stack([each["pixel_values"] for each in examples]),
        "labels": [each["labels"] for each in examples],
    }


def load_examples(config: DataConfig, processor: Any, model_config: Any, head: Head) -> Examples:
    """Images with their boxes; see `Task.load`.

    An image is scaled to fit into the model's image size, and padded at the right and the bottom, unless the processor
    makes images of exactly that size.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HfDmsError(f"model.task object-detection needs {' and '.join(missing)}: pip install 'hf_dms[detection]'.")
    if "annotations" not in inspect.signature(processor.preprocess).parameters:
        raise HfDmsError(
            f"model.path: the image processor is a {type(processor).__name__}, which takes no boxes. Save one for "
            "detection in its place, such as YolosImageProcessor."
        )
    prepare = preparation(processor, model_config, **_fitting(processor, model_config))
    sources = load_sources(config)
    truths: dict[int, list[tuple[Tensor, list[int]]]] = {}  # by source

    def rows_of(source: Source, numbers: list[int]) -> Any:
        boxes = read_boxes(source, config)
        # The labels of all boxes come as one flat list, in the order of the rows.
        rest = iter(numbers)
        # By identity: the held-out source can be the training source itself.
        truths[id(source)] = [(each, [next(rest) for _ in each]) for each in boxes]
        rows = undecoded(source, config)
        examples = BoxedImages(rows, source, config, truths[id(source)], prepare)
        for index in evenly_spaced(range(len(rows)), CHECKED):
            examples.checked(index, index)
        return rows

    train_rows, held_out_rows, names = load_labelled(sources, config, head, rows_of, read_categories)
    train, held_out = (
        BoxedImages(rows, source, config, truths[id(source)], prepare)
        for rows, source in ((train_rows, sources[0]), (held_out_rows, sources[1] or sources[0]))
    )
    if not any(len(held_out.truths[place][0]) for place in held_out_rows["place"]):
        raise HfDmsError(
            f"data.held_out: none of the {len(held_out)} held-out images has a box, so there is nothing to measure."
        )
    train[0]  # raises if the model does not accept the processor's images
    return Examples(train, held_out, collate, names, "images", config_values(names))


def _fitting(processor: Any, config: Any) -> dict[str, Any]:
    """Arguments of the processor with which it fits any image into the model's image size.

    Raises:
        HfDmsError: the model has no image size, and its processor makes images of many.
    """
    _, height, width = image_shape(config)
    if height is None and set(dict(processor.size)) != {"height", "width"}:
        raise HfDmsError(
            f"model.path: the image processor makes images of many sizes, and a {config.model_type} takes any. Images "
            "of one batch need one size. Write image_size: [height, width] into the model's config.json; images are "
            "then scaled to fit into it and padded."
        )
    if height is None or dict(processor.size) == {"height": height, "width": width}:
        return {}
    return {
        "size": {"max_height": height, "max_width": width},
        "pad_size": {"height": height, "width": width},
        "do_pad": True,
    }


# ---- the metric ------------------------------------------------------------------------------------------------------
def true_and_found(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """True boxes and found boxes (`found_boxes`) of a batch, as rows for `average_precision`: `[batch, rows, 7]`.

    Args:
        model: a detector.
        batch: its inputs, and `labels`.
    """
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    scores, classes, boxes = found_boxes(model, outputs)
    found = torch.cat([torch.full_like(scores, FOUND)[..., None], classes[..., None], scores[..., None], boxes], -1)
    rows = []
    for each, labels in zip(found, batch["labels"]):
        numbers = labels["class_labels"][:, None].double()
        true = torch.cat([torch.full_like(numbers, TRUE), numbers, torch.ones_like(numbers), labels["boxes"]], -1)
        rows.append(torch.cat([true, each]))
    # From DETR's centre, width and height to COCO's left, top, width and height.
    rows = [torch.cat([each[:, :3], each[:, 3:5] - each[:, 5:] / 2, each[:, 5:]], -1) for each in rows]
    return pad_sequence(rows, batch_first=True, padding_value=torch.nan)


# ---- samples ---------------------------------------------------------------------------------------------------------
def samples(examples: Examples, processor: Any, options: SampleOptions) -> list[Sample]:
    """Some held-out images with their true boxes; see `Task.samples`."""
    return [
        {"outputs": {}, "pictures": {}}
        | dict(zip(("input", "label"), _shown(row["pixel_values"], _true(row), examples)))
        for row in sample_rows(examples, options)
    ]


@torch.no_grad()
def detected(
    samples: list[Sample], name: str, model: PreTrainedModel, processor: Any, examples: Examples, options: SampleOptions
) -> list[Sample]:
    """Each sample with the boxes that a model finds with a probability of at least ½; see `Task.answers`."""
    if not samples:
        return samples
    rows = sample_rows(examples, options)
    pixels = examples.collate(rows)["pixel_values"]
    all_found = found_boxes(model, model(pixel_values=pixels.to(model.device)))
    answered = []
    for sample, row, *found in zip(samples, rows, *(each.tolist() for each in all_found)):
        sure = [(number, box, score) for score, number, box in zip(*found) if score >= SHOWN_FROM]
        picture, words = _shown(row["pixel_values"], sure, examples)
        outputs_of, pictures = sample["outputs"] | {name: words}, sample["pictures"] | {name: picture}
        answered.append(sample | {"outputs": outputs_of, "pictures": pictures})
    return answered


def _true(row: Mapping[str, Any]) -> list[tuple[int, list[float], float | None]]:
    labels = row["labels"]
    return [(number, box, None) for number, box in zip(labels["class_labels"].tolist(), labels["boxes"].tolist())]


def _shown(pixels: Tensor, objects: list[tuple[int, list[float], float | None]], examples: Examples) -> tuple[str, str]:
    """Objects drawn on their image as a data URI, and in words.

    Args:
        pixels: `[channels, height, width]`.
        objects: each one's class, box (centre, width and height, as shares of the image) and probability.
        examples: the examples, for the names of the classes.
    """
    from PIL import ImageDraw

    image = as_image(pixels).convert("RGB")
    scale = PICTURE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    draw = ImageDraw.Draw(image)
    words = []
    for number, (x, y, width, height), probability in objects:
        colour, name = COLOURS[number % len(COLOURS)], examples.labels[number]
        left, top = (x - width / 2) * image.width, (y - height / 2) * image.height
        draw.rectangle((left, top, left + width * image.width, top + height * image.height), outline=colour)
        draw.text((left + 2, top), name, fill=colour)
        words.append(name if probability is None else f"{name} {probability:.0%}")
    # 64 colours: a page with pictures stays small.
    return data_uri(image.quantize(64)), ", ".join(words) or "nothing"


OBJECT_DETECTION = dataclasses.replace(
    IMAGE_CLASSIFICATION,
    name="object-detection",
    model_class="AutoModelForObjectDetection",
    ending="ForObjectDetection",
    metric="mean_average_precision",
    fewest_classes=1,
    load=load_examples,
    score=true_and_found,
    of_all=average_precision,
    samples=samples,
    answers=detected,
)
