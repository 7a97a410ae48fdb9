"""image-classification: one class for each image. Images are decoded and resized on access."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from ..archs.inputs import image_shape
from ..errors import HfDmsError
from .classification import TEXT_CLASSIFICATION, config_values, load_labelled, samples_shown_as
from .data import DataConfig
from .evaluate import evenly_spaced
from .labels import Head
from .sources import Source, load_sources
from .task import Examples

MODES = {1: "L", 3: "RGB"}  # PIL's name of the colour mode, by number of channels
CHECKED = 20_000  # at most this many images of a source are decoded before a run, to find broken ones; about a minute
Preparation = Callable[..., Mapping[str, Any]]
THUMBNAIL = 64  # pixels of the longer side of a picture in a report


class Pictures(Dataset):
    """Images as a model's arguments, decoded and resized on demand.

    Args:
        rows: a `datasets.Dataset` with the undecoded image, the number of its class (`labels`) and its `place` in
            the source.
        source: their source, for errors.
        column: the column of the image.
        prepare: see `preparation`.
    """

    def __init__(self, rows: Any, source: Source, column: str, prepare: Preparation) -> None:
        self.rows, self.source, self.column, self.prepare = rows, source, column, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch; a DataLoader calls this method if there is one."""
        images = [decoded(self.rows, index, self.source, self.column) for index in indices]
        pixels = self.prepare(images)["pixel_values"]
        # The label alone, or the image's bytes would be read a second time.
        rest = self.rows.select_columns(["labels"])
        return [{"pixel_values": each, "labels": rest[index]["labels"]} for each, index in zip(pixels, indices)]


def decoded(rows: Any, index: int, source: Source, column: str) -> Any:
    """One image of a source.

    Args:
        rows: rows with the image's bytes or path, and their `place` in the source (`undecoded`).
        index: index of the row.
        source: the source, for errors.
        column: the column of the image.

    Raises:
        HfDmsError: the image is missing or cannot be decoded, or its numbers have no fixed white.
    """
    row = rows[index]
    file = row[column]
    if file is None:
        raise HfDmsError(f"{source.cell(row['place'], column)} has no image. Leave such rows out.")
    name = f" {file['path']}" if file["path"] else ""
    try:
        content = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
        image = source.rows.features[column].decode_example({"bytes": content, "path": None})
    except (OSError, ValueError, SyntaxError) as error:  # PIL's errors for a truncated file, or for no image at all
        raise HfDmsError(
            f"{source.cell(row['place'], column)} has an image{name} that cannot be decoded ({error}). "
            "Leave such rows out."
        ) from error
    if image.mode in ("I", "F"):
        raise HfDmsError(
            f"{source.cell(row['place'], column)} has an image{name} of 32 bits (PIL's mode {image.mode}), in which no "
            "number stands for white. Save it with 8 or 16 bits."
        )
    return _in_8_bits(image) if image.mode.startswith("I;16") else image


def _in_8_bits(image: Any) -> Any:
    """A grey image of 16 bits, converted to 8. PIL's `convert` would clip values above 255, and leave a white image."""
    from PIL import Image

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def load_examples(config: DataConfig, processor: Any, model_config: Any, head: Head) -> Examples:
    """Images with the numbers of their classes; see `Task.load`."""
    prepare = preparation(processor, model_config)
    sources = load_sources(config)

    def rows_of(source: Source, numbers: list[int]) -> Any:
        rows = undecoded(source, config).add_column("labels", numbers)
        for index in evenly_spaced(range(len(rows)), CHECKED):
            decoded(rows, index, source, config.image_column)
        return rows

    train, held_out, names = load_labelled(sources, config, head, rows_of)
    train = Pictures(train, sources[0], config.image_column, prepare)
    held_out = Pictures(held_out, sources[1] or sources[0], config.image_column, prepare)
    train[0]  # raises if the model does not accept the processor's images
    return Examples(train, held_out, default_data_collator, names, "images", config_values(names))


def undecoded(source: Source, config: DataConfig) -> Any:
    """The images of a source as a `datasets.Dataset` for `decoded`, with the `place` of each in the source.

    Raises:
        HfDmsError: there is no such column, or it does not hold images.
    """
    import datasets

    source.check_column(config, "image_column")
    feature = source.rows.features[config.image_column]
    if not isinstance(feature, datasets.Image):
        raise HfDmsError(
            f"data.image_column: column '{config.image_column}' of {source.path} holds {feature}, not images. Give a "
            "folder of images, or a dataset whose column is of the type datasets.Image."
        )
    rows = source.rows.select_columns([config.image_column])
    return rows.cast_column(config.image_column, datasets.Image(decode=False)).add_column("place", range(len(rows)))


def preparation(processor: Any, config: Any, **sizes: Any) -> Preparation:
    """A function from PIL images in any colour mode to a model's inputs (`pixel_values`, and labels if any).

    Args:
        processor: the model's image processor. For a grey model, three equal means and deviations count as one.
        config: the model's config.
        sizes: further arguments of the processor.

    Returns:
        `prepare(images, **more)`; `more` are further arguments of the processor, such as boxes in the images.

    Raises:
        HfDmsError: the model takes neither one nor three channels. The function raises it if the processor makes images
            that the model does not accept.
    """
    channels, height, width = image_shape(config)
    if channels not in MODES:
        raise HfDmsError(f"model.path: the model takes images of {channels} channels; hf_dms reads those of 1 or 3.")
    options = dict(sizes)
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        # Processors of grey models are often saved with the three equal numbers of a colour model.
        if channels == 1 and isinstance(values, list | tuple) and len(values) == 3 and len(set(values)) == 1:
            options[name] = list(values[:1])

    def prepare(images: list[Any], **more: Any) -> Mapping[str, Any]:
        try:
            images = [image.convert(MODES[channels]) for image in images]
            made = processor(images, return_tensors="pt", **options, **more)
            found = tuple(made["pixel_values"].shape[1:])
        except ValueError as error:
            sizes_of = ", ".join(sorted({f"{image.width} × {image.height}" for image in images}))
            raise HfDmsError(
                f"model.path: the image processor cannot prepare images of {channels} channels and {sizes_of} pixels "
                f"({error})."
            ) from error
        expected = (channels, height or found[1], width or found[2])
        if found != expected:
            raise HfDmsError(
                f"model.path: the image processor makes {found} of an image (channels, height, width), and the model "
                f"takes {expected}. Set size, image_mean and image_std in preprocessor_config.json accordingly."
            )
        return made

    return prepare


# ---- samples ---------------------------------------------------------------------------------------------------------
def picture(pixels: Tensor) -> str:
    """An image as a model sees it, as a small PNG in a data URI; see `as_image`."""
    image = as_image(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image)


def as_image(pixels: Tensor) -> Any:
    """An image as a model sees it, as a PIL image, with its colours stretched over the whole range.

    Args:
        pixels: `[channels, height, width]`. With one or three channels all are shown, otherwise only the first.
    """
    from PIL import Image

    pixels = pixels.float()[: 3 if len(pixels) == 3 else 1]
    low, high = pixels.min(), pixels.max()
    levels = ((pixels - low) / (high - low).clamp_min(1e-12) * 255).byte().cpu()
    return Image.fromarray(levels.permute(1, 2, 0).squeeze(-1).numpy())


def data_uri(image: Any) -> str:
    """A PIL image as a PNG in a data URI."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


IMAGE_CLASSIFICATION = dataclasses.replace(
    TEXT_CLASSIFICATION,
    name="image-classification",
    model_class="AutoModelForImageClassification",
    processor_class="AutoImageProcessor",
    ending="ForImageClassification",
    peft=None,
    speed=("images_per_second", "images/s"),
    load=load_examples,
    samples=samples_shown_as(lambda example, processor: picture(example["pixel_values"])),
)
