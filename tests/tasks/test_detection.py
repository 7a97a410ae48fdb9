"""Images with boxes become a detector's inputs, its results are measured by COCO's mAP, and bad boxes are reported."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Value
from helpers.scenes import (
    LARGE_SIDE,
    NAMES,
    SIDE,
    conditional_detr,
    detector,
    detr,
    detr_processor,
    pictures,
    processor,
    rt_detr,
    write_scenes,
)
from transformers import ViTImageProcessorPil

from hf_dms.tasks.average_precision import FOUND, TRUE, average_precision
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.detection import detected, samples, true_and_found
from hf_dms.tasks.evaluate import example_scores, summary
from hf_dms.tasks.found_boxes import found_boxes
from hf_dms.tasks.registry import TASKS, load_examples

TASK = TASKS["object-detection"]
BOXES = [[[1, 2, 4, 6]], [[0, 0, 8, 8], [8, 8, 8, 8]], [], [[3, 3, 5, 5]]]
CATEGORIES = [[0], [1, 2], [], [1]]


def load(path, model=None, prepare=None, held_out=None, new_head=False, **options):
    data = DataConfig(path=str(path), held_out=held_out or str(path), **options)
    return load_examples(data, TASK, prepare or processor(), (model or detector()).config, new_head=new_head)


def rows(*images):
    """The arguments of `average_precision`, from lists of (kind, class, probability, box)."""
    longest = max(len(image) for image in images)
    found = torch.full((len(images), longest, 7), torch.nan, dtype=torch.float64)
    for place, image in enumerate(images):
        for row, (kind, number, probability, box) in enumerate(image):
            found[place, row] = torch.tensor([kind, number, probability, *box], dtype=torch.float64)
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------
def test_boxes_in_pixels_become_centres_relative_to_the_image(tmp_path):
    examples = load(write_scenes(tmp_path / "a.parquet", BOXES, CATEGORIES))
    assert (len(examples.train), examples.labels, examples.unit) == (4, NAMES, "images")
    batch = examples.collate([examples.train[0], examples.train[2]])
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    first, second = batch["labels"]
    assert torch.allclose(first["boxes"] * SIDE, torch.tensor([[3.0, 5.0, 4.0, 6.0]]))
    assert (first["class_labels"].tolist(), second["class_labels"].tolist()) == ([0], [])
    assert second["boxes"].shape == (0, 4)


def test_an_image_of_another_shape_is_fitted_and_filled_up_with_its_boxes(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", [[[8, 4, 8, 4]]], [["dog"]], pictures(1, (32, 16)), Value("string"))
    example = load(path, prepare=processor(size={"shortest_edge": 800, "longest_edge": 1333})).train[0]
    assert example["pixel_values"].shape == (3, SIDE, SIDE)
    assert not example["pixel_values"][:, SIDE // 2 :].any()
    assert torch.allclose(example["labels"]["boxes"] * SIDE, torch.tensor([[6.0, 3.0, 4.0, 2.0]]))
    assert example["labels"]["class_labels"].tolist() == [1]


def test_a_model_of_images_of_any_size_needs_one_in_its_config_or_from_its_processor(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", [[[8, 4, 8, 4]]], [["dog"]], pictures(1, (32, 16)), Value("string"))
    any_size = detr_processor(size={"shortest_edge": 800, "longest_edge": 1333})
    with pytest.raises(
        ValueError, match=r"images of many sizes, and a detr takes any. .* Write image_size: \[height, wid"
    ):
        load(path, detr(), any_size)
    assert load(path, detr(), detr_processor()).train[0]["pixel_values"].shape == (3, SIDE, SIDE)
    example = load(path, detr(image_size=[SIDE, SIDE]), any_size).train[0]
    assert example["pixel_values"].shape == (3, SIDE, SIDE)
    assert not example["pixel_values"][:, SIDE // 2 :].any()
    assert torch.allclose(example["labels"]["boxes"] * SIDE, torch.tensor([[6.0, 3.0, 4.0, 2.0]]))


def test_an_example_is_the_same_alone_and_in_a_batch(tmp_path):
    train = load(write_scenes(tmp_path / "a.parquet", BOXES, CATEGORIES)).train
    for alone, together in zip([train[i] for i in (2, 0, 1)], train.__getitems__([2, 0, 1])):
        assert torch.equal(alone["pixel_values"], together["pixel_values"])
        assert torch.equal(alone["labels"]["boxes"], together["labels"]["boxes"])


def test_a_share_that_is_held_out_keeps_its_boxes(tmp_path):
    boxes = [[[i, i, 4, 4]] for i in range(10)]
    examples = load(write_scenes(tmp_path / "a.parquet", boxes, [[0]] * 10), held_out=0.5)
    found = {
        round(float(each["labels"]["boxes"][0, 0] * SIDE) - 2) for each in map(examples.held_out.__getitem__, range(5))
    }
    others = {
        round(float(each["labels"]["boxes"][0, 0] * SIDE) - 2) for each in map(examples.train.__getitem__, range(5))
    }
    assert found | others == set(range(10))


def test_a_folder_of_images_with_metadata_is_read(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for place, (image, boxes, names) in enumerate(zip(pictures(2), BOXES, (["cat"], ["dog", "emu"]))):
        image.save(folder / f"{place}.png")
        lines.append({"file_name": f"{place}.png", "objects": {"bbox": boxes, "category": names}})
    Dataset.from_list(lines).to_json(folder / "metadata.jsonl")
    examples = load(folder)
    assert [each["labels"]["class_labels"].tolist() for each in map(examples.train.__getitem__, range(2))] == [
        [0],
        [1, 2],
    ]


def test_a_new_head_gets_the_classes_of_the_data_even_a_single_one(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", [[[1, 1, 2, 2]]] * 2, [["fox"]] * 2, kind=Value("string"))
    examples = load(path, detector(id2label={0: "LABEL_0", 1: "LABEL_1"}), new_head=True)
    assert (examples.labels, examples.config["id2label"]) == (("fox",), {0: "fox"})
    assert load(path, detector(id2label={0: "fox"})).labels == ("fox",)


def test_categories_by_number_and_names_that_several_classes_share_are_read_as_for_coco(tmp_path):
    coco = detector(id2label={0: "N/A", 1: "cat", 2: "N/A", 3: "dog"})
    by_name = write_scenes(tmp_path / "a.parquet", BOXES[:1], [["dog"]], kind=Value("string"))
    by_number = write_scenes(tmp_path / "b.parquet", BOXES[:1], [[3]], kind=Value("int64"))
    for path in (by_name, by_number):
        assert load(path, coco).train[0]["labels"]["class_labels"].tolist() == [3]


@pytest.mark.parametrize(("make", "kind"), [(conditional_detr, "conditional_detr"), (rt_detr, "rt_detr")])
def test_detectors_with_a_probability_per_class_take_fixed_and_fitted_images(make, kind, tmp_path):
    boxes, names = [[[8, 4, 8, 4]], []], [["dog"], []]
    path = write_scenes(tmp_path / "a.parquet", boxes, names, pictures(2, (32, 16)), Value("string"))
    side, any_size = LARGE_SIDE if kind == "rt_detr" else SIDE, {"shortest_edge": 9, "longest_edge": 99}
    fixed = load(path, make(), detr_processor(kind))
    fitted = load(path, make(image_size=[side, side]), detr_processor(kind, size=any_size))
    for examples, top in ((fixed, 0.375), (fitted, 0.1875)):  # stretched to a square, or filled up below
        example = examples.train[0]
        assert example["pixel_values"].shape == (3, side, side)
        assert torch.allclose(example["labels"]["boxes"], torch.tensor([[0.375, top, 0.25, 2 * top / 3]]))
        batch = examples.collate([example, examples.train[1]])
        assert make().train()(**batch).loss.isfinite()
        assert make().train()(**examples.collate([examples.train[1]] * 2)).loss.isfinite()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (
            [[4, 4, 20, 4]],
            r"row 2 of .*, column 'objects', has the box \[4\.0, 4\.0, 20\.0, 4\.0\], which is not",
        ),
        ([[-3, 4, 5, 4]], "row 2 .* not inside its image, 16 pixels wide and 16 high"),
        ([[16, 4, 0.9, 3]], "row 2 .* not inside its image, 16 pixels wide and 16 high"),
        ([[4, -0.9, 3, 0.9]], "row 2 .* not inside its image"),
        ([[4, 4, 0, 4]], r"row 2 .* has the box \[4\.0, 4\.0, 0\.0, 4\.0\], which has no area"),
        ([[4, 4, 2]], r"row 2 .* has the box \[4\.0, 4\.0, 2\.0\], which is no list of four numbers"),
        ([[4, 4, 2, math.nan]], "row 2 .* whose numbers are not all finite"),
        ([[4, 4, 2, 2]] * 2, "row 2 .* has 2 boxes and 1 categories. Give one category per box"),
    ],
)
def test_a_box_that_is_none_is_named_with_its_row(box, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write_scenes(tmp_path / "a.parquet", [[[1, 1, 2, 2]], box], [[0], [1]]))


def test_a_box_may_stand_out_by_a_pixel_as_those_of_coco_do(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", [[[8, 8, 8.4, 8]]], [[0]])
    assert load(path).train[0]["labels"]["boxes"].max() <= 1


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[1, 1, 2, 2]], "category": [7]}, "objects_column: the labels are 7; the model has the classes cat"),
        (
            {"bbox": [[1, 1, 2, 2]], "category": ["wolf"]},
            "labels are wolf; .* row 1 of .* has the first label that is no class",
        ),
        ({"bbox": [[1, 1, 2, 2]], "category": [None]}, r"row 1 of .* has no label \(None\)"),
        ({"bbox": [[1, 1, 2, 2]]}, r"objects_column: column 'objects' of .* not \{bbox: "),
        ([{"bbox": [1, 1, 2, 2], "category": 0}], r"objects_column: column 'objects' of .* not \{bbox: "),
        (None, "row 1 of .* has no objects. For an image without any write"),
    ],
)
def test_objects_of_another_form_are_named(objects, message, tmp_path):
    whole = {"bbox": [[1, 1, 2, 2]], "category": [0]}
    rows = [objects] if objects else [None, whole]
    table = Dataset.from_dict({"image": pictures(len(rows)), "objects": rows})
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.parquet")


def test_the_row_of_a_category_that_is_no_class_is_named(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", BOXES, [[0], [1, 7], [], [1]], kind=Value("int64"))
    with pytest.raises(ValueError, match=r"row 2 of .*, column 'objects', has the first label that is no class, '7'\."):
        load(path)


def test_a_missing_column_is_named(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", BOXES, CATEGORIES)
    with pytest.raises(ValueError, match=r"data\.objects_column: the data has no column 'things'\. It has image"):
        load(path, objects_column="things")


def test_data_without_any_box_can_be_trained_on_but_not_measured_on(tmp_path):
    empty = write_scenes(tmp_path / "a.parquet", [[], []], [[], []])
    full = write_scenes(tmp_path / "b.parquet", BOXES, CATEGORIES)
    examples = load(empty, held_out=full)
    batch = examples.collate([examples.train[0], examples.train[1]])
    assert detector()(**batch).loss.isfinite()
    with pytest.raises(ValueError, match=r"data\.held_out: none of the 2 held-out images has a box"):
        load(full, held_out=empty)
    unnamed = write_scenes(tmp_path / "c.parquet", [[]], [[]], kind=Value("string"))
    with pytest.raises(ValueError, match=r"no row of data\.path has an object, so there are no classes to learn"):
        load(unnamed, detector(id2label={0: "LABEL_0", 1: "LABEL_1"}), held_out=full, new_head=True)


def test_a_processor_that_takes_no_boxes_is_refused(tmp_path):
    path = write_scenes(tmp_path / "a.parquet", BOXES, CATEGORIES)
    with pytest.raises(ValueError, match="processor is a ViTImageProcessorPil, which takes no boxes"):
        load(path, prepare=ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}))


def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dms.tasks.detection.NEEDED", ("pycocotools", "no_such_module"))
    with pytest.raises(ValueError, match=r"needs no_such_module: pip install 'hf_dms\[detection\]'"):
        load(write_scenes(tmp_path / "a.parquet", BOXES, CATEGORIES))


# ---- the metric ------------------------------------------------------------------------------------------------------
def test_a_detector_s_own_boxes_are_found_with_a_precision_of_one(tmp_path):
    """If a detector's own results are the labels, its average precision is 1."""
    model, images = detector(), pictures(6)
    with torch.no_grad():
        last = model.bbox_predictor.layers[-1]
        last.weight.mul_(0.1)
        last.bias.copy_(torch.tensor([0.0, 0, -1, -1]))  # boxes inside the image
        outputs = model(**processor()(images, return_tensors="pt", do_pad=False))
    found = torch.cat([outputs.pred_boxes[..., :2] - outputs.pred_boxes[..., 2:] / 2, outputs.pred_boxes[..., 2:]], -1)
    categories = outputs.logits[..., :-1].argmax(-1)
    path = write_scenes(tmp_path / "a.parquet", (found * SIDE).tolist(), categories.tolist(), images)
    examples = load(path, model)
    scores = example_scores(model, TASK, examples.held_out, examples.collate, batch_size=2)
    assert len(scores) == 6
    assert summary(TASK, scores)["mean_average_precision"] == pytest.approx(1)
    other = example_scores(detector(seed=1), TASK, examples.held_out, examples.collate)
    measured = summary(TASK, other, scores)
    assert measured["mean_average_precision"] < 0.5
    assert measured["difference"] == pytest.approx(measured["mean_average_precision"] - 1)


class Finding:
    """A detector with given outputs."""

    def __init__(self, model, logits, boxes):
        self.config, self.outputs = model.config, SimpleNamespace(logits=logits, pred_boxes=boxes)

    def __call__(self, pixel_values):
        return self.outputs


def test_each_pair_of_a_query_and_a_class_with_a_probability_of_its_own_is_a_box():
    """The first query is a rider, of probability 3/4, and a person, of 2/3; the second one a person, of 1/2."""
    logits = torch.tensor([[[math.log(3), math.log(2), -9.0], [-8.0, 0.0, -7.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.8, 0.8, 0.2, 0.2]]])
    model = Finding(conditional_detr(), logits, boxes)
    probabilities, classes, found = found_boxes(model, model.outputs)
    assert probabilities[0, :3].tolist() == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert classes.tolist() == [[0, 1, 1, 2, 0, 2]]
    assert torch.equal(found[0], boxes[0, [0, 0, 1, 1, 1, 0]])
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes[0, [0, 0]]}]
    rows = true_and_found(model, {"pixel_values": None, "labels": labels})
    assert torch.allclose(rows[0, 0], torch.tensor([TRUE, 0, 1, 0.4, 0.3, 0.2, 0.4], dtype=torch.float64))
    assert average_precision(rows)[0] == pytest.approx(1)
    # With the best class of each query alone, the person would be found at the wrong place only.
    best = rows[:, [row for row in range(rows.shape[1]) if row != 3]]
    assert float(rows[0, 3, 2]) == pytest.approx(2 / 3)
    assert average_precision(best)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["conditional_detr", "rt_detr"])
def test_boxes_are_those_of_the_postprocessing_of_transformers(kind):
    generator = torch.Generator().manual_seed(0)
    classes, queries = 40, 50
    logits = torch.randn(2, queries, classes, generator=generator)
    boxes = torch.rand(2, queries, 4, generator=generator)
    names = dict(enumerate(map(str, range(classes))))
    model = Finding({"conditional_detr": conditional_detr, "rt_detr": rt_detr}[kind](id2label=names), logits, boxes)
    expected = detr_processor(kind).post_process_object_detection(model.outputs, threshold=0.0)
    for image, (found, labels, of_boxes) in enumerate(zip(*found_boxes(model, model.outputs))):
        count = {"conditional_detr": 100, "rt_detr": queries}[kind]  # the latter keeps as many pairs as queries
        assert (len(found), len(expected[image]["scores"])) == (100, count)
        assert torch.allclose(found[:count].float(), expected[image]["scores"])
        assert torch.equal(labels[:count], expected[image]["labels"])
        corners = torch.cat([of_boxes[:, :2] - of_boxes[:, 2:] / 2, of_boxes[:, :2] + of_boxes[:, 2:] / 2], -1)
        assert torch.allclose(corners[:count], expected[image]["boxes"], atol=1e-6)


def test_a_sample_shows_the_pairs_of_at_least_one_half(tmp_path):
    examples = load(write_scenes(tmp_path / "a.parquet", BOXES[:1], CATEGORIES[:1]))
    logits = torch.tensor([[[math.log(3), math.log(2), -9.0], [-8.0, -0.1, -7.0]]])
    model = Finding(conditional_detr(), logits, torch.full((1, 2, 4), 0.5))
    model.device = torch.device("cpu")
    options = SimpleNamespace(samples=1)
    (sample,) = detected(samples(examples, None, options), "dense", model, None, examples, options)
    assert sample["outputs"] == {"dense": "cat 75%, dog 67%"}


def test_scores_do_not_depend_on_the_batch(tmp_path):
    model, examples = detector(), load(write_scenes(tmp_path / "a.parquet", BOXES, CATEGORIES))
    one, all_at_once = (example_scores(model, TASK, examples.held_out, examples.collate, size) for size in (1, 4))
    assert torch.allclose(one, all_at_once, equal_nan=True, atol=1e-6)


def test_average_precision_of_boxes_by_hand():
    """Of IoU 0.775 an object counts at the thresholds 0.50 to 0.75: 6 of 10."""
    box, near, far = (0, 0, 0.4, 0.4), (0, 0, 0.4, 0.31), (0.5, 0.5, 0.2, 0.2)
    first = [(TRUE, 0, 1, box), (FOUND, 0, 0.9, box)]
    second = [(TRUE, 0, 1, box), (FOUND, 0, 0.8, near)]
    assert average_precision(rows(first))[0] == pytest.approx(1)
    assert average_precision(rows(second))[0] == pytest.approx(0.6)
    value, parts = average_precision(rows(first, second))
    assert parts.tolist() == pytest.approx([0.6, 1.0])
    assert value == pytest.approx((6 * 1 + 4 * 51 / 101) / 10)  # at 0.80 and above half of the objects are found
    wrong = [(TRUE, 1, 1, box), (FOUND, 0, 0.99, far)]
    assert average_precision(rows(first, wrong))[0] < 0.3  # class 1 is never found, class 0 first where it is not
    assert math.isnan(average_precision(rows([(FOUND, 0, 0.9, box)]))[0])


def test_the_standard_error_is_the_jackknife_s_and_a_difference_is_paired():
    box, away = (0, 0, 0.4, 0.4), (0.5, 0.5, 0.4, 0.4)
    hit, miss = ([(TRUE, 0, 1, box), (FOUND, 0, 0.9, each)] for each in (box, away))
    half = rows(*[hit, miss] * 10)
    found = summary(TASK, half, half)
    assert 0 < found["stderr"] < 0.3
    assert (found["difference"], found["difference_stderr"]) == (0, 0)
    assert math.isnan(summary(TASK, rows(hit))["stderr"])
