"""Text becomes packed sequences."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from transformers import ViTImageProcessorPil

from hf_dms.tasks.data import DataConfig, load_examples, load_sequences, pack
from hf_dms.tasks.task import TASKS


class Letters:
    """A tokenizer of one token per letter."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(message["content"] for message in messages)


def write(path, rows, column="text"):
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(path)


def test_documents_are_packed_with_an_end_token_between_them(tmp_path):
    config = DataConfig(path=write(tmp_path / "a.jsonl", ["abc", "de", "f"]), sequence_length=2, held_out=0.25)
    train, held_out = load_sequences(config, Letters())
    assert train.tolist() == [[1, 2], [3, 0], [4, 5]]
    assert held_out.tolist() == [[0, 6]]  # 9 tokens, the last quarter held out, the remainder dropped


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    config = DataConfig(path=str(tmp_path / "a.txt"), sequence_length=2, held_out=0.4)
    train, _ = load_sequences(config, Letters())
    assert train.tolist() == [[1, 2], [3, 4]]


def test_held_out_may_be_another_file(tmp_path):
    config = DataConfig(
        path=write(tmp_path / "a.jsonl", ["abc"]), held_out=write(tmp_path / "b.jsonl", ["z"]), sequence_length=2
    )
    assert load_sequences(config, Letters())[1].tolist() == [[26, 0]]


def test_chat_goes_through_the_chat_template(tmp_path):
    chats = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]] * 2
    config = DataConfig(
        path=write(tmp_path / "a.jsonl", chats, "messages"), text_column="messages", sequence_length=5, held_out=0.5
    )
    assert load_sequences(config, Letters())[0].tolist() == [[1, 2, 3, 4, 0]]


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="data has 3 tokens, less than one sequence of 4"):
        pack(torch.arange(3), 4)


# ---- texts and images with labels ----
class Words:
    """A tokenizer of one token per word, its length."""

    padding_side, pad_token_id, model_input_names = "right", 0, ("input_ids",)

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}

    def pad(self, features, **_):
        longest = max(len(feature["input_ids"]) for feature in features)
        rows = [feature["input_ids"] + [0] * (longest - len(feature["input_ids"])) for feature in features]
        return {"input_ids": torch.tensor(rows), "labels": torch.tensor([feature["labels"] for feature in features])}


TEXTS = TASKS["text-classification"]
IMAGES = TASKS["image-classification"]


def labelled(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def test_texts_are_cut_off_and_their_labels_numbered(tmp_path):
    path = labelled(tmp_path / "a.jsonl", [("to be or not", "yes"), ("no", "no"), ("be", "yes"), ("x", "no")])
    config = DataConfig(path=path, held_out=path, sequence_length=3)
    examples = load_examples(config, TEXTS, Words())
    assert examples.labels == ("no", "yes")
    assert examples.train[0] == {"input_ids": [2, 2, 2], "labels": 1}
    batch = examples.collate([examples.train[0], examples.train[1]])
    assert batch["input_ids"].tolist() == [[2, 2, 2], [2, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_a_model_that_knows_the_labels_keeps_its_numbers(tmp_path):
    path = labelled(tmp_path / "a.jsonl", [("a", "no"), ("b", "yes")])
    config = DataConfig(path=path, held_out=path)
    known = {"yes": 0, "no": 1, "perhaps": 2}
    assert load_examples(config, TEXTS, Words(), known).labels == ("yes", "no", "perhaps")
    assert load_examples(config, TEXTS, Words(), {"LABEL_0": 0, "LABEL_1": 1}).labels == ("no", "yes")


def test_a_share_is_held_out_once_and_for_all(tmp_path):
    config = DataConfig(path=labelled(tmp_path / "a.jsonl", [(str(i), "x") for i in range(10)]), held_out=0.3)
    first, second = (load_examples(config, TEXTS, Words()) for _ in range(2))
    assert (len(first.train), len(first.held_out)) == (7, 3)
    assert first.held_out == second.held_out


def test_an_unknown_held_out_label_is_named(tmp_path):
    path, other = labelled(tmp_path / "a.jsonl", [("a", "no")]), labelled(tmp_path / "b.jsonl", [("a", "maybe")])
    with pytest.raises(ValueError, match=r"data.held_out: label 'maybe' is not among those of data.path: no"):
        load_examples(DataConfig(path=path, held_out=other), TEXTS, Words())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_column": "kind"}, r"data.label_column: the data has no column 'kind'. It has text, label"),
        ({"text_column": "body"}, r"data.text_column: the data has no column 'body'. It has text, label"),
    ],
)
def test_a_missing_column_is_named(option, message, tmp_path):
    path = labelled(tmp_path / "a.jsonl", [("a", "no")])
    with pytest.raises(ValueError, match=message):
        load_examples(DataConfig(path=path, held_out=path, **option), TEXTS, Words())


def processor():
    return ViTImageProcessorPil(size={"height": 4, "width": 4})


def pictures(count):
    return [Picture.new("L", (8, 8), 40 * i) for i in range(count)]


def test_images_of_a_file_become_pixels_and_labels(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"image": pictures(4), "label": [0, 1, 1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    config = DataConfig(path=str(tmp_path / "a.parquet"), held_out=0.5)
    examples = load_examples(config, IMAGES, processor())
    assert examples.labels == ("cat", "dog")
    batch = examples.collate([examples.train[0], examples.train[1]])
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["labels"].shape == (2,)


def test_a_folder_of_images_has_its_labels_in_the_names_of_its_subfolders(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i, picture in enumerate(pictures(3)):
            picture.save(tmp_path / "images" / name / f"{i}.png")
    examples = load_examples(DataConfig(path=str(tmp_path / "images"), held_out=0.34), IMAGES, processor())
    assert examples.labels == ("cat", "dog")
    assert (len(examples.train), len(examples.held_out)) == (3, 3)
