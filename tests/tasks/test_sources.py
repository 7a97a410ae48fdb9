"""Each odd input works, or ends in one error that names the file, the row or the column, and what to do."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from datasets import DatasetDict, load_from_disk
from helpers.data import letters, write_rows
from helpers.laws import TEXT
from helpers.tiny import TINY
from transformers import BertConfig, LlamaConfig

from hf_dms.errors import HfDmsError
from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.registry import TASKS, load_examples

WORDS = [{"text": "abc"}, {"text": "de"}]
JSONL = "".join(json.dumps(row) + "\n" for row in WORDS)
LABELLED = [{"text": "abc", "label": "no"}, {"text": "de", "label": "yes"}]


def load(path, task="text-generation", **options):
    config = LlamaConfig(**TINY) if task == "text-generation" else BertConfig(**TEXT, architectures=["BertModel"])
    options = {"sequence_length": 2, "held_out": str(path)} | options
    return load_examples(DataConfig(path=str(path), **options), TASKS[task], letters(), config)


def windows(path, **options):
    return [row["input_ids"].tolist() for row in load(path, **options).held_out]


def classes(path, **options):
    return [row["labels"] for row in load(path, "text-classification", **options).held_out]


def refused(message, path, task="text-generation", **options):
    with pytest.raises(HfDmsError) as error:
        load(path, task, **options)
    text = str(error.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert text.startswith("data."), text


# ---- what works ----
ONE_STREAM = [[3, 4], [5, 2], [6, 7]]  # ab c</s> de, the last </s> left over


def write(name, content):
    def make(folder: Path):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def rows(name, values):
    return lambda folder: write_rows(folder / name, values)


def packed(open_, path):
    with open_(path, "wt", encoding="utf-8") as file:
        file.write(JSONL)


def folder_of(folder, *names):
    folder.mkdir()
    for name, row in zip(names, WORDS):
        write_rows(folder / name, [row])
    (folder / "README.md").write_text("What this is.")


def splits(folder):
    write_rows(folder / "rows", WORDS)
    rows = load_from_disk(folder / "rows")
    DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(folder / "both")


WORKS = {
    "jsonl": rows("a.jsonl", WORDS),
    "json": write("a.json", json.dumps(WORDS)),
    "csv": rows("a.csv", WORDS),
    "tsv": rows("a.tsv", WORDS),
    "parquet": rows("a.parquet", WORDS),
    "suffix in capitals": write("a.JSONL", JSONL),
    "jsonl.gz": lambda folder: packed(gzip.open, folder / "a.jsonl.gz"),
    "jsonl.bz2": lambda folder: packed(bz2.open, folder / "a.jsonl.bz2"),
    "jsonl.xz": lambda folder: packed(lzma.open, folder / "a.jsonl.xz"),
    "folder of jsonl": lambda folder: folder_of(folder / "a", "1.jsonl", "2.jsonl"),
    "folder of jsonl with other names": lambda folder: folder_of(folder / "a", "train-1.jsonl", "train-2.jsonl"),
    "folder of csv": lambda folder: folder_of(folder / "a", "1.csv", "2.csv"),
    "folder of tsv": lambda folder: folder_of(folder / "a", "1.tsv", "2.tsv"),
    "saved dataset": rows("a", WORDS),
    "nulls among texts": rows("a.jsonl", [WORDS[0], {"text": None}, {"text": ""}, WORDS[1]]),
    "a byte order mark": write("a.jsonl", "\ufeff" + JSONL),
}


@pytest.mark.parametrize("kind", WORKS)
def test_text_is_read_from(kind, tmp_path):
    WORKS[kind](tmp_path)
    (path,) = tmp_path.iterdir()
    assert windows(path) == ONE_STREAM


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8-sig")
    assert windows(tmp_path / "a.txt") == [[3, 4], [5, 2]]


def test_text_that_is_not_ascii_is_read_as_utf_8(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUTF8", "0")
    (tmp_path / "a.txt").write_text("é", encoding="utf-8")
    assert windows(tmp_path / "a.txt") == [[29, 2]]  # one letter that the tokenizer does not know


def test_a_saved_dataset_of_splits_has_these_splits(tmp_path):
    splits(tmp_path)
    examples = load(tmp_path / "both", held_out="test")
    assert (len(examples.train), len(examples.held_out)) == (2, 3)
    refused(r"data.split: .*both has no split 'dev'. It has train, test", tmp_path / "both", split="dev", held_out=0.5)


def test_files_of_a_folder_that_are_named_like_splits_are_splits(tmp_path):
    folder_of(tmp_path / "a", "train.jsonl", "test.jsonl")
    examples = load(tmp_path / "a", held_out="test")
    assert [row["input_ids"].tolist() for row in examples.train] == [[3, 4], [5, 2]]
    assert [row["input_ids"].tolist() for row in examples.held_out] == [[6, 7]]


def test_parts_of_a_file_are_splits(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", WORDS)
    examples = load(path, split="train[:1]", held_out="train[1:]")
    assert [row["input_ids"].tolist() for row in examples.train] == [[3, 4], [5, 2]]
    assert [row["input_ids"].tolist() for row in examples.held_out] == [[6, 7]]


def test_cells_of_a_template_without_a_value_are_empty_texts(tmp_path):
    rows = [{"a": "b", "b": None, "c": 1}, {"a": "c", "b": "d", "c": 2}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert windows(path, template="{a}{b}") == [[4, 2], [5, 6]]
    refused(r"cannot be filled .ValueError.*row 1 of .*a.jsonl", path, template="{b:.2f}")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_cells_that_say_none_or_na_are_texts_and_names(suffix, tmp_path):
    rows = [{"text": "null", "label": "None"}, {"text": "NA", "label": "NA"}, {"text": "nan", "label": "x"}]
    path = write_rows(tmp_path / f"a{suffix}", rows)
    assert load(path, "text-classification").labels == ("NA", "None", "x")
    assert len(load(path, "text-classification").train) == 3


@pytest.mark.parametrize("share", ["1e-1", "0.1", 0.1])
def test_a_share_may_be_written_as_yaml_reads_it(share, tmp_path):
    assert DataConfig(path="x", held_out=share).held_out == 0.1
    rows = [{"text": "a", "label": i % 2} for i in range(20)]
    examples = load(write_rows(tmp_path / "a.jsonl", rows), "text-classification", held_out=share)
    assert (len(examples.train), len(examples.held_out)) == (18, 2)


# ---- what is refused ----
LATIN = "caf\xe9 au lait".encode("latin-1")
REFUSED = {
    "empty txt": (write("a.txt", ""), r"a.txt has no text|a.txt is empty"),
    "blank txt": (write("a.txt", " \n"), r"has \d tokens, less than one sequence of 2"),
    "empty jsonl": (write("a.jsonl", ""), r"data.path: .*a.jsonl is empty"),
    "empty json": (write("a.json", ""), r"data.path: .*a.json is empty"),
    "json without rows": (write("a.json", "[]"), r"data.path: .*a.json"),
    "empty csv": (write("a.csv", ""), r"data.path: .*a.csv is empty"),
    "empty parquet": (write("a.parquet", ""), r"data.path: .*a.parquet is empty"),
    "csv of a header": (write("a.csv", "text,label\n"), r"data.path: .*a.csv holds no rows"),
    "latin-1 txt": (write("a.txt", LATIN), r"data.path: .*a.txt is not UTF-8 .*position 3.*iconv"),
    "latin-1 jsonl": (write("a.jsonl", b'{"text": "' + LATIN + b'"}\n'), r"data.path: .*a.jsonl is not UTF-8 .*iconv"),
    "latin-1 csv": (write("a.csv", b"text\n" + LATIN + b"\n"), r"data.path: .*a.csv is not UTF-8 .*iconv"),
    "utf-16 txt": (write("a.txt", "abc".encode("utf-16")), r"data.path: .*a.txt is not UTF-8 .*iconv"),
    "broken jsonl": (write("a.jsonl", '{"text": "a"}\n{"text": oops\n'), r"a.jsonl cannot be read as json .*row 1"),
    "ragged csv": (write("a.csv", "text,label\na,1\nb,2,3\n"), r"a.csv cannot be read as csv .*line 3"),
    "cut parquet": (write("a.parquet", b"PAR1xxxx"), r"a.parquet cannot be read as parquet"),
    "false gz": (write("a.jsonl.gz", "text"), r"a.jsonl.gz cannot be read as json .*[Nn]ot a gzipped"),
    "another kind": (write("a.xlsx", "text"), r"a.xlsx is not a kind of file that can be read. Known are .txt, .json"),
    "numbers": (rows("a.jsonl", [{"text": 7}]), r"row 1 of .*a.jsonl, column 'text', holds 7, which is not text"),
    "a number": (rows("a.jsonl", [*WORDS, {"text": 7}]), r"row 3 of .*column 'text', holds 7, which is not text"),
    "numbers in csv": (rows("a.csv", [{"text": 7}]), r"row 1 of .*a.csv, column 'text', holds 7, which is not text"),
    "nulls alone": (rows("a.jsonl", [{"text": None}]), r"data.path: .*a.jsonl has no text in column 'text'"),
    "another column": (
        rows("a.jsonl", [{"body": "a"}]),
        r"data.text_column: the data has no column 'text'. It has body",
    ),
    "a chat without a template": (
        rows("a.jsonl", [{"text": [{"role": "user", "content": "a"}]}]),
        r"row 1 of .*column 'text', is not a chat",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_text_that_cannot_be_had_is_refused_in_one_line(kind, tmp_path, capfd):
    make, message = REFUSED[kind]
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    refused(message, path)
    assert not capfd.readouterr().err  # nothing else is printed


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    refused(r"data.path: the folder .*a holds neither images nor", tmp_path / "a")


def test_a_folder_of_several_kinds_of_files_is_refused(tmp_path):
    """`datasets` reads the kind with the most files, and leaves the others out without a word."""
    folder_of(tmp_path / "a", "1.jsonl", "2.csv")
    refused(r"data.path: the folder .*a holds files of several kinds, .csv, .jsonl, .*Name one", tmp_path / "a")


def test_the_file_of_a_folder_that_cannot_be_read_is_named(tmp_path):
    folder_of(tmp_path / "a", "1.jsonl", "2.jsonl")
    (tmp_path / "a" / "3.jsonl").write_bytes(b'{"text": "' + LATIN + b'"}\n')
    refused(r"data.path: .*3.jsonl is not UTF-8", tmp_path / "a")


def test_a_dataset_that_is_nowhere_is_refused():
    refused(r"data.path: cannot read 'nobody/nothing'", "nobody/nothing", held_out=0.5)


@pytest.mark.parametrize("held_out", ["test", "5%", "0,05", "notes.md"])
def test_what_is_no_split_of_a_file_is_not_measured_on(held_out, tmp_path):
    """Without the check the training rows would be the held-out ones."""
    message = rf"data.held_out: .*(a.jsonl|rows) has no split '{held_out}'. .*a share such as 0.05"
    refused(message, write_rows(tmp_path / "a.jsonl", WORDS), held_out=held_out)
    refused(message, write_rows(tmp_path / "rows", WORDS), held_out=held_out)


def test_a_split_that_a_file_lacks_is_refused(tmp_path):
    refused(r"data.split: .*a.jsonl has no split 'dev'", write_rows(tmp_path / "a.jsonl", WORDS), split="dev")


def test_a_held_out_dataset_of_the_hub_is_no_split_of_a_file(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", WORDS)
    refused(r"data.held_out: cannot read 'nobody/nothing'", path, held_out="nobody/nothing")


def test_the_folder_of_held_out_data_is_called_so(tmp_path):
    (tmp_path / "b").mkdir()
    path = write_rows(tmp_path / "a.jsonl", WORDS)
    refused(r"data.held_out: the folder .*b holds neither", path, held_out=str(tmp_path / "b"))


@pytest.mark.parametrize("held_out", ["b.jsonl", "empty.jsonl"])
def test_held_out_data_is_called_so(held_out, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", LABELLED)
    write_rows(tmp_path / "b.jsonl", WORDS)
    (tmp_path / "empty.jsonl").write_text("")
    message = {
        "b.jsonl": r"data.held_out: .*b.jsonl has no column 'label' \(data.label_column\). It has text",
        "empty.jsonl": r"data.held_out: .*empty.jsonl is empty",
    }[held_out]
    refused(message, path, "text-classification", held_out=str(tmp_path / held_out))


def test_held_out_text_needs_the_column_too(tmp_path):
    path, other = write_rows(tmp_path / "a.jsonl", WORDS), write_rows(tmp_path / "b.jsonl", [{"body": "a"}])
    refused(r"data.held_out: .*b.jsonl has no column 'text' \(data.text_column\)", path, held_out=other)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*LABELLED, {"text": None, "label": "no"}], r"row 3 of .*, column 'text', has no text"),
        ([*LABELLED, {"text": "", "label": "no"}], r"row 3 of .*, column 'text', is empty"),
        ([*LABELLED, {"text": "a", "label": None}], r"row 3 of .*, column 'label', has no label"),
        ([LABELLED[0]], "all labels are 'no'. A classifier needs two classes"),
        (WORDS, "data.label_column: the data has no column 'label'. It has text"),
    ],
)
def test_rows_that_cannot_be_classified_are_refused(rows, message, tmp_path):
    refused(message, write_rows(tmp_path / "a.jsonl", rows), "text-classification")


def test_a_row_is_counted_in_its_file_though_a_share_of_it_is_held_out(tmp_path):
    rows = [{"text": None if i == 13 else "a", "label": i % 2} for i in range(20)]
    refused("row 14 of", write_rows(tmp_path / "a.jsonl", rows), "text-classification", held_out=0.5)


def test_a_share_of_one_row_cannot_be_held_out(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    data, config = (
        DataConfig(path=path, held_out=0.5),
        BertConfig(**TEXT, architectures=["BertForSequenceClassification"]),
    )
    with pytest.raises(HfDmsError, match=r"data.held_out: no share of 0.5 can be held out of 1 rows of"):
        load_examples(data, TASKS["text-classification"], letters(), config)
