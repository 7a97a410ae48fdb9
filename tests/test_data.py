"""Text becomes packed sequences."""

import json

import pytest
import torch

from hf_dms.data import DataConfig, load_sequences, pack


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
