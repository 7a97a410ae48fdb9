"""Text becomes packed windows, which never change, and which begin as the tokenizer begins a text."""

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from helpers.data import letters, write_rows
from helpers.tiny import TINY
from transformers import AutoTokenizer, LlamaConfig

from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.evaluate import evenly_spaced
from hf_dms.tasks.generation import load_sequences, load_streams, pack, start_token
from hf_dms.tasks.registry import TASKS, load_examples

ROOT = Path(__file__).parents[2]
SOTU = [str(ROOT / "recipes" / "data" / f"sotu_{part}.jsonl") for part in ("train", "heldout")]
TASK = TASKS["text-generation"]


def documents(path, texts):
    return write_rows(path, [{"text": text} for text in texts])


def test_documents_are_packed_with_an_end_token_between_them(tmp_path):
    config = DataConfig(path=documents(tmp_path / "a.jsonl", ["abc", "de", "f"]), sequence_length=2, held_out=0.25)
    train, held_out = load_sequences(config, letters())
    assert train.tolist() == [[3, 4], [5, 2], [6, 7]]
    assert held_out.tolist() == [[2, 8]]  # 9 tokens, the last quarter held out, the remainder dropped


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("abcd\nefgh")
    config = DataConfig(path=str(tmp_path / "a.txt"), sequence_length=2, held_out=0.4)
    assert load_sequences(config, letters())[0].tolist() == [[3, 4], [5, 6]]


def test_held_out_may_be_another_file(tmp_path):
    path, held_out = documents(tmp_path / "a.jsonl", ["abc"]), documents(tmp_path / "b.jsonl", ["z"])
    config = DataConfig(path=path, held_out=held_out, sequence_length=2)
    assert load_sequences(config, letters())[1].tolist() == [[28, 2]]


def test_chat_goes_through_the_chat_template(tmp_path):
    chats = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}] * 2
    path = write_rows(tmp_path / "a.jsonl", chats)
    config = DataConfig(path=path, text_column="messages", sequence_length=5, held_out=0.5)
    tokenizer = letters(chat_template="{% for message in messages %}{{ message.content }}{% endfor %}")
    assert load_sequences(config, tokenizer)[0].tolist() == [[3, 4, 5, 6, 2]]


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="data has 3 tokens, less than one sequence of 4"):
        pack(torch.arange(3), 4)


def test_examples_are_tensors_whose_labels_are_the_tokens(tmp_path):
    config = DataConfig(path=documents(tmp_path / "a.jsonl", ["abc"]), held_out=0.5, sequence_length=2)
    examples = load_examples(config, TASK, letters(), LlamaConfig(**TINY))
    batch = examples.collate([examples.train[0], examples.held_out[0]])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[3, 4], [5, 2]]
    assert (examples.labels, examples.unit, examples.config) == ((), "sequences of 2 tokens", {})


# ---- several sources ----
def test_sources_are_mixed_by_weight_and_the_smaller_one_comes_again(tmp_path):
    """All sequences of `path` come once, those of another path `weight` times as often. Only `path` is held out."""
    config = DataConfig(
        path=documents(tmp_path / "a.jsonl", ["a" * 64]),
        mix={documents(tmp_path / "b.jsonl", ["bbb", "ccc"]): 0.5, documents(tmp_path / "d.jsonl", ["ddd"]): 2},
        held_out=documents(tmp_path / "e.jsonl", ["eee"]),
        sequence_length=4,
    )
    examples = load_examples(config, TASK, letters(), LlamaConfig(**TINY))
    rows = [tuple(examples.train[i]["input_ids"].tolist()) for i in range(len(examples.train))]
    assert {row: rows.count(row) for row in rows} == {
        (3, 3, 3, 3): 16, (4, 4, 4, 2): 4, (5, 5, 5, 2): 4, (6, 6, 6, 2): 32,
    }  # fmt: skip
    assert [row["input_ids"].tolist() for row in examples.held_out] == [[7, 7, 7, 2]]


def test_rows_at_even_distances_are_of_every_source(tmp_path):
    config = DataConfig(
        path=documents(tmp_path / "a.jsonl", ["a" * 400]),
        mix={documents(tmp_path / "b.jsonl", ["b" * 400]): 1},
        sequence_length=2,
    )
    rows = evenly_spaced(load_examples(config, TASK, letters(), LlamaConfig(**TINY)).train, 48)
    assert 16 < sum(int(row["input_ids"][0]) == 3 for row in rows) < 32


def test_a_mistake_in_a_mix_names_its_source(tmp_path):
    path = documents(tmp_path / "a.jsonl", ["abcd"])
    with pytest.raises(ValueError, match=r"data\.mix\.\S+c\.jsonl: there is no file"):
        DataConfig(path=path, mix={str(tmp_path / "c.jsonl"): 1})
    with pytest.raises(ValueError, match=r"data\.mix\.x must be a weight above 0, got 0\. With 1, there is as much"):
        DataConfig(path=path, mix={"x": 0})
    with pytest.raises(ValueError, match=r"data\.mix\.\S+a\.jsonl is data\.path itself, whose weight is 1"):
        DataConfig(path=path, mix={path: 1})
    with pytest.raises(ValueError, match=r"data\.own_sequences must be at least 1, got 0"):
        DataConfig(path=path, own_sequences=0)
    with pytest.raises(ValueError, match=r"data\.held_out must be a file, a folder or a dataset if data\.path is self"):
        DataConfig(path="self")
    short = documents(tmp_path / "b.jsonl", ["b"])
    config = DataConfig(path=path, mix={short: 1}, held_out=path, sequence_length=4)
    with pytest.raises(ValueError, match=r"data\.mix\.\S+b\.jsonl has 2 tokens, less than one sequence of 4"):
        load_examples(config, TASK, letters(), LlamaConfig(**TINY))
    other = write_rows(tmp_path / "d.jsonl", [{"body": "b"}])
    config = DataConfig(path=path, mix={other: 1}, held_out=path, sequence_length=4)
    with pytest.raises(ValueError, match=r"data\.mix\.\S+d\.jsonl: data\.text_column: the data has no column 'text'"):
        load_examples(config, TASK, letters(), LlamaConfig(**TINY))


# ---- the windows of committed numbers stay ----
def windows_of_lists(paths, tokenizer, length, held_out):
    """The windows as an earlier hf_dms made them from a Python list. The committed numbers were measured on these."""
    import datasets

    streams = []
    for path in paths:
        texts = datasets.load_dataset("json", data_files=path, split="train")["text"]
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        streams.append([token for each in encoded for token in (*each, tokenizer.eos_token_id)])
    if held_out is not None:
        place = int(len(streams[0]) * (1 - held_out))
        streams = [streams[0][:place], streams[0][place:]]
    return [torch.tensor(stream[: len(stream) // length * length]).view(-1, length) for stream in streams]


@pytest.mark.parametrize("held_out", [None, 0.05])
def test_windows_of_a_tokenizer_without_a_start_are_those_of_one_list_of_tokens(held_out):
    paths = SOTU if held_out is None else SOTU[:1]
    config = DataConfig(path=SOTU[0], held_out=held_out or SOTU[1], sequence_length=256)
    found = load_sequences(config, letters())
    for part, expected in zip(found, windows_of_lists(paths, letters(), 256, held_out)):
        assert torch.equal(part, expected)


@pytest.mark.slow
def test_the_windows_of_the_quickstart_are_those_that_its_numbers_were_measured_on():
    folder = ROOT / "models" / "smollm2-135m"
    if not folder.exists():
        pytest.fail(f"{folder} is missing: run `make model`.")
    config = DataConfig(path=SOTU[0], held_out=SOTU[1], sequence_length=256)
    for part, digest in zip(load_sequences(config, AutoTokenizer.from_pretrained(folder)), ("aecac177", "0734567f")):
        assert hashlib.sha256(part.numpy().tobytes()).hexdigest().startswith(digest)


# ---- the token that begins a text ----
def test_a_start_token_begins_every_document_and_every_window(tmp_path):
    path = documents(tmp_path / "a.jsonl", ["abcd", "ef"])
    config = DataConfig(path=path, held_out=path, sequence_length=3)
    assert load_sequences(config, letters(begins=True))[0].tolist() == [
        [1, 3, 4],  # <s> a b
        [1, 5, 6],  # <s> c d: inside the document, so <s> is put before it
        [1, 2, 1],  # <s> </s> <s>: the end of the document, and the next one begins
        [1, 7, 8],  # <s> e f
    ]


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_windows_with_a_start_token_hold_the_same_text_in_order(length, tmp_path):
    path = documents(tmp_path / "a.jsonl", ["abcdefgh", "ij", "klmnopqrstuv", "w"])
    config = DataConfig(path=path, held_out=path, sequence_length=length)
    with_start = load_sequences(config, letters(begins=True))[0]
    without = load_streams(config, letters()).train
    assert (with_start[:, 0] == 1).all()
    text = [token for token in with_start.flatten().tolist() if token != 1]
    assert text == without[: len(text)].tolist()
    assert len(without) - len(text) < length


def test_a_tokenizer_that_only_has_a_start_token_gets_none():
    assert start_token(letters()) is None
    assert start_token(letters(begins=True)) == 1
    assert start_token(letters(bos_token=None)) is None


def test_a_chat_that_begins_with_the_start_token_gets_no_second_one(tmp_path):
    chat = [{"messages": [{"role": "user", "content": "ab"}]}]
    config = DataConfig(path=write_rows(tmp_path / "a.jsonl", chat), text_column="messages", sequence_length=2)
    config.held_out = config.path
    tokenizer = letters(begins=True, chat_template="<s>{{ messages[0].content }}")
    assert load_sequences(config, tokenizer)[0].tolist() == [[1, 3], [1, 4], [1, 2]]


# ---- what does not fit the model ----
def load(tmp_path, tokenizer=None, length=4, **config):
    path = documents(tmp_path / "a.jsonl", ["abcdefghijklmnopqrstuvwxyz"] * 4)
    data = DataConfig(path=path, held_out=path, sequence_length=length)
    return load_examples(data, TASK, tokenizer or letters(), LlamaConfig(**(TINY | config)))


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path):
    load(tmp_path, vocab_size=29)
    with pytest.raises(ValueError, match=r"the tokenizer writes token 28 \('z'\), and the model knows 28, 0 to 27"):
        load(tmp_path, vocab_size=28)


def test_windows_beyond_the_positions_of_the_model_warn(tmp_path, caplog):
    load(tmp_path, length=64)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load(tmp_path, length=65)
    assert "data.sequence_length is 65 tokens, and the model was made for at most 64" in caplog.text


def test_each_document_is_tokenised_once(tmp_path, monkeypatch):
    path = documents(tmp_path / "a.jsonl", ["abc", "de"])
    seen, tokenizer = [], letters()

    class Counting(type(tokenizer)):
        def __call__(self, text, *args, **kwargs):
            seen.extend([text] if isinstance(text, str) else text)
            return super().__call__(text, *args, **kwargs)

    tokenizer.__class__ = Counting
    load_examples(DataConfig(path=path, held_out=path, sequence_length=2), TASK, tokenizer, LlamaConfig(**TINY))
    assert sorted(text for text in seen if text != "a") == ["abc", "de"]
