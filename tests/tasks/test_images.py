"""Images become pixels that the model takes, in its colours. Images that cannot be decoded are named before a run."""

import io

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.evaluate import example_scores
from hf_dms.tasks.registry import TASKS, load_examples

TASK = TASKS["image-classification"]
HALF = [0.5]


def vit(**options):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTConfig(**{"image_size": 4, "patch_size": 2, "architectures": ["ViTModel"]} | sizes | options)


def processor(size=4, **options):
    return ViTImageProcessorPil(size={"height": size, "width": size}, **options)


def pictures(count, mode="L"):
    return [Picture.new("L", (8, 8), 40 * i).convert(mode) for i in range(count)]


def parquet(path, images, labels, names=("cat", "dog")):
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
    return str(path)


def load(path, config=None, prepare=None, held_out=0.5):
    return load_examples(DataConfig(path=str(path), held_out=held_out), TASK, prepare or processor(), config or vit())


def test_images_of_a_file_become_pixels_and_labels(tmp_path):
    examples = load(parquet(tmp_path / "a.parquet", pictures(4), [0, 1, 1, 0]))
    assert examples.labels == ("cat", "dog")
    assert (len(examples.train), len(examples.held_out)) == (2, 2)
    batch = examples.collate([examples.train[0], examples.train[1]])
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["labels"].shape == (2,)


def test_an_example_is_the_same_alone_and_in_a_batch(tmp_path):
    train = load(parquet(tmp_path / "a.parquet", pictures(6), [0, 1, 1, 0, 1, 0])).train
    for alone, together in zip([train[i] for i in (2, 0, 1)], train.__getitems__([2, 0, 1])):
        assert torch.equal(alone["pixel_values"], together["pixel_values"])
        assert alone["labels"] == together["labels"]


def folder_of_images(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures(3)):
            picture.save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_images_has_its_labels_in_the_names_of_its_subfolders(tmp_path):
    examples = load(folder_of_images(tmp_path / "images", "cat", "dog"), held_out=0.34)
    assert examples.labels == ("cat", "dog")
    assert (len(examples.train), len(examples.held_out)) == (3, 3)


def test_the_order_of_subfolders_is_not_that_of_a_trained_heads_classes(tmp_path):
    config = vit(architectures=["ViTForImageClassification"])  # with classes LABEL_0 and LABEL_1
    with pytest.raises(ValueError, match=r"the labels are cat, dog; the model has the classes LABEL_0 \(0\)"):
        load(folder_of_images(tmp_path / "images", "cat", "dog"), config)


def test_subfolders_named_by_numbers_are_the_classes_of_these_numbers(tmp_path):
    names = {i: f"LABEL_{i}" for i in range(12)}
    config = vit(architectures=["ViTForImageClassification"], id2label=names)
    folder = folder_of_images(tmp_path / "images", "2", "10", "11")
    examples = load(folder, config, held_out=str(folder))
    assert sorted({row["labels"] for row in map(examples.train.__getitem__, range(9))}) == [2, 10, 11]
    assert examples.labels == tuple(names.values())


# ---- colours ----
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_keep_their_greys(channels, tmp_path):
    grey = torch.arange(64).view(8, 8)
    sixteen = [Picture.fromarray((grey * 1024).numpy().astype("uint16"))] * 4  # 0 to 64512 of 65535
    eight = [Picture.fromarray((grey * 4).numpy().astype("uint8"))] * 4
    config = vit(num_channels=channels)
    found, expected = (
        load(parquet(tmp_path / f"{name}.parquet", images, [0, 1, 1, 0]), config).train[0]["pixel_values"]
        for name, images in (("16", sixteen), ("8", eight))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_images_of_32_bits_have_no_white(kind, tmp_path):
    images = [Picture.fromarray(torch.rand(8, 8).numpy().astype(kind))] * 4
    for place, image in enumerate(images):
        (tmp_path / "images" / str(place % 2)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / str(place % 2) / f"{place}.tiff")
    with pytest.raises(ValueError, match=r"row 1 of .*has an image .*0.tiff of 32 bits \(PIL's mode [IF]\)"):
        load(tmp_path / "images", held_out=0.5)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_colours_have_the_channels_of_the_model(mode, channels, tmp_path):
    path = parquet(tmp_path / "a.parquet", pictures(4, mode), [0, 1, 1, 0])
    prepare = processor(image_mean=HALF * channels, image_std=HALF * channels)
    assert load(path, vit(num_channels=channels), prepare).train[0]["pixel_values"].shape == (channels, 4, 4)


def test_three_equal_means_count_as_one_for_a_grey_model(tmp_path):
    path = parquet(tmp_path / "a.parquet", pictures(4), [0, 1, 1, 0])
    one = load(path, vit(num_channels=1), processor(image_mean=HALF, image_std=HALF)).train[0]["pixel_values"]
    three = load(path, vit(num_channels=1), processor(image_mean=HALF * 3, image_std=HALF * 3)).train[0]
    assert torch.equal(one, three["pixel_values"])


def test_own_predictions_of_a_grey_model_give_accuracy_one(tmp_path):
    names = {0: "dark", 1: "bright", 2: "other"}
    config = vit(num_channels=1, architectures=["ViTForImageClassification"], id2label=names)
    torch.manual_seed(1)
    model = ViTForImageClassification(config).eval()
    images, prepare = pictures(6), processor(image_mean=HALF, image_std=HALF)
    with torch.no_grad():
        classes = model(**prepare(images, return_tensors="pt")).logits.argmax(-1).tolist()
    path = parquet(tmp_path / "a.parquet", images, classes, ["other", "bright", "dark"][::-1])
    examples = load(path, config, prepare, held_out=path)
    assert example_scores(model, TASK, examples.held_out, examples.collate, 2).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"num_channels": 1}, {"image_mean": [0.1, 0.2, 0.3]}, "the image processor (cannot prepare|makes)"),
        ({"num_channels": 2}, {}, "the model takes images of 2 channels; hf_dms reads those of 1 or 3"),
        ({"image_size": 8}, {}, r"makes \(3, 4, 4\) of an image .*, and the model takes \(3, 8, 8\)"),
    ],
)
def test_a_processor_that_makes_other_images_than_the_model_takes_is_refused(config, options, message, tmp_path):
    path = parquet(tmp_path / "a.parquet", pictures(4), [0, 1, 1, 0])
    with pytest.raises(ValueError, match=message):
        load(path, vit(**config), processor(**options))


# ---- what is no image ----
def encoded(picture, cut=None):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue()[:cut], "path": None}


@pytest.mark.parametrize("cut", [60, 20, 0])
def test_a_truncated_image_is_named_before_anything_runs(cut, tmp_path):
    noise = Picture.effect_noise((32, 32), 50)
    images = [encoded(noise), encoded(noise), encoded(noise, cut), encoded(noise)]
    path = parquet(tmp_path / "a.parquet", images, [0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"row 3 of .*a.parquet, column 'image', has an image that cannot be decoded"):
        load(path)


def test_a_truncated_file_in_a_folder_is_named(tmp_path):
    folder = folder_of_images(tmp_path / "images", "cat", "dog")
    noise = encoded(Picture.effect_noise((32, 32), 50), 60)["bytes"]
    (folder / "cat" / "1.png").write_bytes(noise)
    with pytest.raises(
        ValueError, match=r"row 2 of .*images, column 'image', has an image .*1.png that cannot be decoded"
    ):
        load(folder)


def test_a_missing_image_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", [encoded(pictures(1)[0]), None], [0, 1])
    with pytest.raises(ValueError, match=r"row 2 of .*a.parquet, column 'image', has no image"):
        load(path)


def test_a_column_without_images_is_refused(tmp_path):
    features = Features({"image": Value("string"), "label": Value("int64")})
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"image": ["a.png", "b.png"], "label": [0, 1]}, features=features).to_parquet(path)
    with pytest.raises(
        ValueError, match=r"data.image_column: column 'image' of .* holds Value\('string'\), not images"
    ):
        load(path)
    with pytest.raises(ValueError, match=r"data.image_column: the data has no column 'picture'"):
        load_examples(DataConfig(path=path, image_column="picture"), TASK, processor(), vit())
