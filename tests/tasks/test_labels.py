"""A classifier's own predictions as labels give accuracy 1, in any format, or an error; a head is never relabelled."""

import logging
import random

import pytest
import torch
from datasets import ClassLabel, Value
from helpers.data import as_class_label, letters, texts_with_labels, write_rows
from helpers.laws import TEXT
from transformers import BertConfig, BertForSequenceClassification

from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.evaluate import example_scores
from hf_dms.tasks.registry import TASKS, load_examples, load_more_examples

TASK = TASKS["text-classification"]
ANIMALS = ["cat", "Dog", "emu", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lion", "mole", "newt", "owl"]


def classifier(names, seed=0, **options):
    """A BERT with a trained head. Its texts fall into different classes."""
    config = BertConfig(
        **TEXT | {"vocab_size": 40, "pad_token_id": 0},
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        architectures=["BertForSequenceClassification"], **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        logits = model(**letters()(some_texts(100), return_tensors="pt")).logits
        model.classifier.bias -= logits.mean(0)  # so that no class is predicted for all texts
    return model


def some_texts(count, seed=0):
    source = random.Random(seed)
    return ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def load(path, config, held_out=None, **options):
    data = DataConfig(path=str(path), held_out=str(held_out or path))
    return load_examples(data, TASK, letters(), config, **options)


@torch.no_grad()
def texts_of_classes(model, wanted, count=60):
    """Texts whose predicted classes are among the given ones, with these classes."""
    texts = some_texts(4 * count, seed=1)
    predictions = model(**letters()(texts, return_tensors="pt")).logits.argmax(-1).tolist()
    found = [(text, number) for text, number in zip(texts, predictions) if number in wanted]
    assert {number for _, number in found} == set(wanted)
    return found[:count]


def accuracy(model, path):
    examples = load(path, model.config)
    assert examples.labels == tuple(model.config.id2label.values())
    return float(example_scores(model, TASK, examples.held_out, examples.collate, 8).mean())


FORMATS = {  # what a label becomes: (suffix, value of a class number and its name)
    "integers in jsonl": (".jsonl", lambda number, name: number),
    "names in jsonl": (".jsonl", lambda number, name: name),
    "numbers as text in jsonl": (".jsonl", lambda number, name: str(number)),
    "whole floats in jsonl": (".jsonl", lambda number, name: float(number)),
    "names in other case in jsonl": (".jsonl", lambda number, name: f" {name.upper()} "),
    "integers in csv": (".csv", lambda number, name: number),
    "names in csv": (".csv", lambda number, name: name),
    "whole floats in csv": (".csv", lambda number, name: float(number)),
    "names in tsv": (".tsv", lambda number, name: name),
    "integers in parquet": (".parquet", lambda number, name: number),
    "names in parquet": (".parquet", lambda number, name: name),
    "whole floats in parquet": (".parquet", lambda number, name: float(number)),
    "names in a saved dataset": ("", lambda number, name: name),
}


@pytest.fixture(scope="module", params=["own names", "no names of its own", "numbers as names"])
def thirteen(request):
    """A classifier of thirteen classes, and texts of five of them."""
    names = {
        "own names": ANIMALS,
        "no names of its own": [f"LABEL_{i}" for i in range(13)],
        "numbers as names": [str(i) for i in range(13)],
    }[request.param]
    model = classifier(names)
    return model, names, texts_of_classes(model, {2, 3, 9, 10, 12})


@pytest.mark.parametrize("form", FORMATS)
def test_own_predictions_as_labels_give_accuracy_one(form, thirteen, tmp_path):
    model, names, texts = thirteen
    suffix, value = FORMATS[form]
    rows = [{"text": text, "label": value(number, names[number])} for text, number in texts]
    assert accuracy(model, write_rows(tmp_path / f"data{suffix}", rows)) == 1.0


@pytest.mark.parametrize("order", ["the head's", "another"])
def test_own_predictions_as_class_labels_give_accuracy_one(order, thirteen, tmp_path):
    model, names, texts = thirteen
    listed = names if order == "the head's" else sorted(names, key=str.lower, reverse=True)
    rows = [{"text": text, "label": listed.index(names[number])} for text, number in texts]
    path = write_rows(tmp_path / "data.parquet", rows, {"label": ClassLabel(names=listed)})
    assert accuracy(model, path) == 1.0


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("names", [("no", "yes"), ("False", "True"), ("LABEL_0", "LABEL_1")])
def test_own_predictions_as_booleans_give_accuracy_one(suffix, names, tmp_path):
    model = classifier(names)
    rows = [{"text": text, "label": bool(number)} for text, number in texts_of_classes(model, {0, 1}, 20)]
    assert accuracy(model, write_rows(tmp_path / f"data{suffix}", rows)) == 1.0


def test_class_labels_of_other_names_are_numbers_for_a_head_without_names(tmp_path):
    model = classifier([f"LABEL_{i}" for i in range(12)])
    texts = texts_of_classes(model, {1, 10, 11})
    path = as_class_label([number for _, number in texts], ANIMALS[:12], tmp_path / "a.parquet")
    examples = load(path, model.config)
    assert [row["labels"] for row in examples.train] == [number for _, number in texts]
    assert examples.labels == tuple(f"LABEL_{i}" for i in range(12))  # the names of the head


# ---- or an error ----
def labelled(path, labels, **features):
    return write_rows(path, texts_with_labels(labels), features)


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["negative", "positive"], ["neg", "pos"], r"labels are neg, pos; the model has the classes negative \(0\), "),
        (["negative", "positive"], [0, 1, 2], r"labels are 0, 1, 2; the model has the classes negative \(0\), "),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], r"labels are neg, pos; the model has the classes LABEL_0 \(0\)"),
        (["cat", "CAT"], ["Cat", "cat"], r"labels are Cat, cat; the model has the classes cat \(0\), CAT \(1\)"),
        (["1", "2", "3"], [1, 2], r"labels 1, 2 can be read as names and as numbers of different classes"),
        (["1", "2", "3"], ["1", "2"], r"labels 1, 2 can be read as names and as numbers of different classes"),
        (["True", "False"], [True, False], r"labels False, True can be read as names and as numbers of different"),
        (["no", "yes"], ["no", -1], r"the labels are -1, no; the model has the classes no \(0\), yes \(1\)"),
        (["no", "yes"], [0.5, 1.0], r"row 1 of .*, column 'label', holds 0.5, which is not a class"),
        (["no", "yes"], [[0], [1]], r"row 1 of .*, column 'label', holds several labels, \[0\]"),
        (["no", "yes"], ["yes", None], r"row 2 of .*, column 'label', has no label \(None\)"),
        (["no", "yes"], ["yes", "no", " "], r"row 3 of .*, column 'label', has no label \(' '\)"),
    ],
)  # fmt: skip
def test_labels_that_are_no_classes_of_the_head_are_refused(names, labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(labelled(tmp_path / "a.jsonl", labels), classifier(names).config)


def test_a_class_label_of_minus_one_is_no_label(tmp_path):
    path = as_class_label([0, -1], ["no", "yes"], tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 2 of .*a.parquet, column 'label', has no label \(-1\)"):
        load(path, classifier(["no", "yes"]).config)


def test_class_labels_of_other_names_are_refused_by_a_head_with_names(tmp_path):
    path = as_class_label([0, 1], ["neg", "pos"], tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"labels are neg, pos; the model has the classes negative"):
        load(path, classifier(["negative", "positive"]).config)


def test_names_that_are_numbers_of_other_classes_need_a_class_label(tmp_path):
    config = classifier(["1", "2", "3"]).config
    path = as_class_label([0, 2], ["1", "2", "3"], tmp_path / "a.parquet")
    assert [row["labels"] for row in load(path, config).train] == [0, 2]


def test_names_in_another_case_are_the_heads_and_that_is_said(tmp_path, caplog):
    path = labelled(tmp_path / "a.jsonl", ["Positive", "NEGATIVE"])
    with caplog.at_level(logging.WARNING):
        examples = load(path, classifier(["positive", "negative"]).config)
    assert [row["labels"] for row in examples.train] == [0, 1]
    assert "The labels NEGATIVE, Positive are taken as positive, negative, regardless of case." in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem_type": "regression"}, "the head is for regression"),
        ({"problem_type": "multi_label_classification"}, "the head is for multi label classification"),
    ],
)
def test_heads_for_other_problems_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(labelled(tmp_path / "a.jsonl", [0, 1]), classifier(["no", "yes"], **options).config)


def test_a_head_of_one_output_is_one_for_regression(tmp_path):
    with pytest.raises(ValueError, match=r"the head is for regression \(1 outputs\)"):
        load(labelled(tmp_path / "a.jsonl", [0.5, 1.5]), classifier(["LABEL_0"]).config)


# ---- heads that are not trained ----
def untrained(**options):
    return BertConfig(**TEXT | {"vocab_size": 40, "pad_token_id": 0}, architectures=["BertModel"], **options)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["yes", "no", "yes"], ("no", "yes")),
        ([10, 2, 1, 0, 11], ("0", "1", "2", "10", "11")),
        (["10", "2", "1"], ("1", "2", "10")),
        ([2.0, 1.0, 10.0], ("1", "2", "10")),
        ([True, False], ("False", "True")),
    ],
)
def test_a_new_head_gets_the_classes_of_the_data_numbers_in_order(labels, names, tmp_path):
    examples = load(labelled(tmp_path / "a.jsonl", labels), untrained())
    assert examples.labels == names
    assert examples.config["id2label"] == dict(enumerate(names))
    assert [names[row["labels"]] for row in examples.train] == [
        str(int(label) if isinstance(label, float) else label) for label in labels
    ]


def test_a_new_head_gets_all_names_of_a_class_label(tmp_path):
    path = as_class_label([2, 0, 2], ["z", "y", "a"], tmp_path / "a.parquet")
    assert load(path, untrained()).labels == ("z", "y", "a")


@pytest.mark.parametrize("labels", [["yes", "no"], [0, 1]])
def test_a_new_head_keeps_the_names_that_its_config_gives_it(labels, tmp_path):
    config = untrained(id2label={0: "yes", 1: "no", 2: "perhaps"}, label2id={"yes": 0, "no": 1, "perhaps": 2})
    examples = load(labelled(tmp_path / "a.jsonl", labels), config)
    assert examples.labels == ("yes", "no", "perhaps")
    assert [row["labels"] for row in examples.train] == [0, 1]


def test_a_head_that_will_be_random_gets_the_classes_of_the_data(tmp_path):
    path = labelled(tmp_path / "a.jsonl", ["neg", "pos"])
    assert load(path, classifier(["good", "bad"]).config, new_head=True).labels == ("neg", "pos")


def test_a_config_that_names_no_class_of_model_is_taken_as_one_of_a_trained_head(tmp_path):
    config = BertConfig(**TEXT | {"num_labels": 2})
    assert [row["labels"] for row in load(labelled(tmp_path / "a.jsonl", [1, 0]), config).train] == [1, 0]
    with pytest.raises(ValueError, match=r"give a model without a head \(architectures in its config.json names none"):
        load(labelled(tmp_path / "b.jsonl", ["neg", "pos"]), config)


def test_one_class_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"all labels are 'yes'. A classifier needs two classes"):
        load(labelled(tmp_path / "a.jsonl", ["yes", "yes"]), untrained())


def test_a_trained_head_may_be_measured_on_one_class(tmp_path):
    assert [row["labels"] for row in load(labelled(tmp_path / "a.jsonl", [2]), classifier("abc").config).train] == [2]


def test_an_unknown_held_out_label_is_named(tmp_path):
    path, other = labelled(tmp_path / "a.jsonl", ["no", "yes"]), labelled(tmp_path / "b.jsonl", ["maybe"])
    with pytest.raises(ValueError, match=r"data.held_out: label 'maybe' is not among those of data.path: no, yes"):
        load(path, untrained(), other)


def test_held_out_labels_may_be_written_in_another_way(tmp_path):
    path, other = labelled(tmp_path / "a.jsonl", [0, 1]), labelled(tmp_path / "b.csv", ["1", "0"])
    examples = load(path, untrained(), other)
    assert [row["labels"] for row in examples.held_out] == [1, 0]


def test_more_examples_have_the_classes_of_the_first(tmp_path):
    first = load(labelled(tmp_path / "a.jsonl", ["no", "yes"]), untrained())
    data = DataConfig(path=labelled(tmp_path / "b.jsonl", ["yes"]), held_out=str(tmp_path / "b.jsonl"))
    assert [row["labels"] for row in load_more_examples(data, TASK, letters(), untrained(), first).train] == [1]
    other = DataConfig(path=labelled(tmp_path / "c.jsonl", ["maybe"]), held_out=str(tmp_path / "c.jsonl"))
    with pytest.raises(ValueError, match=r"the labels are maybe; the model has the classes no \(0\), yes \(1\)"):
        load_more_examples(other, TASK, letters(), untrained(), first)


def test_an_integer_column_of_any_width_is_numbers(tmp_path):
    path = labelled(tmp_path / "a.parquet", [1, 0], label=Value("uint8"))
    assert [row["labels"] for row in load(path, classifier("ab").config).train] == [1, 0]
