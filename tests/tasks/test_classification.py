"""Texts become tokens that fit the model, with padding that it recognises. Samples show a classifier's predictions."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.data import letters, write_rows
from helpers.laws import TEXT
from helpers.tiny import TINY, tiny_llama
from transformers import BertConfig, LlamaConfig, LlamaForSequenceClassification, RobertaConfig

from hf_dms.tasks.data import DataConfig
from hf_dms.tasks.registry import TASKS, load_examples
from hf_dms.tasks.texts import padding_of

TASK = TASKS["text-classification"]
ROWS = [{"text": "abc", "label": "no"}, {"text": "d", "label": "yes"}]


def load(tmp_path, config, tokenizer=None, rows=ROWS, **options):
    path = write_rows(tmp_path / "a.jsonl", rows)
    return load_examples(DataConfig(path=path, held_out=path, **options), TASK, tokenizer or letters(), config)


def bert(**options):
    return BertConfig(**TEXT | {"pad_token_id": 0, "architectures": ["BertModel"]} | options)


def test_texts_are_cut_off_padded_and_their_labels_numbered(tmp_path):
    examples = load(tmp_path, bert(), sequence_length=2)
    assert examples.labels == ("no", "yes")
    assert examples.train[0] == {"input_ids": [3, 4], "attention_mask": [1, 1], "labels": 0}
    batch = examples.collate([examples.train[0], examples.train[1]])
    assert batch["input_ids"].tolist() == [[3, 4], [6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [0, 1]


def test_a_share_is_held_out_once_and_for_all(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abcdefghij"[i], "label": i % 2} for i in range(10)])
    data = DataConfig(path=path, held_out=0.3)
    first, second = (load_examples(data, TASK, letters(), bert()) for _ in range(2))
    assert (len(first.train), len(first.held_out)) == (7, 3)
    assert list(first.held_out) == list(second.held_out)
    tokens = [row["input_ids"][0] for part in (first.train, first.held_out) for row in part]
    assert sorted(tokens) == list(range(3, 13))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_column": "kind"}, r"data.label_column: the data has no column 'kind'. It has text, label"),
        ({"text_column": "body"}, r"data.text_column: the data has no column 'body'. It has text, label"),
    ],
)
def test_a_missing_column_is_named(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, bert(), **option)


# ---- what fits the model ----
@pytest.mark.parametrize(
    ("config", "longest"),
    [(BertConfig, 16), (RobertaConfig, 14)],  # RoBERTa's positions begin after that of the padding token, 1
    ids=["bert", "roberta"],
)
def test_texts_longer_than_the_positions_of_the_model_are_refused(config, longest, tmp_path):
    config = config(**TEXT | {"pad_token_id": 0 if longest == 16 else 1, "architectures": ["BertModel"]})
    rows = [{"text": "a" * 40, "label": "no"}, ROWS[1]]
    with pytest.raises(
        ValueError, match=f"has 40 tokens, and the model has positions for {longest}. Set data.sequence"
    ):
        load(tmp_path, config, rows=rows)
    examples = load(tmp_path, config, rows=rows, sequence_length=longest)
    if config.model_type == "bert":
        batch = examples.collate([examples.train[0]])
        from transformers import BertForSequenceClassification

        assert BertForSequenceClassification(config)(**batch).loss.isfinite()


def test_short_texts_need_no_positions_for_the_default_length(tmp_path):
    assert len(load(tmp_path, bert()).train) == 2


def test_texts_longer_than_a_decoder_was_made_for_warn(tmp_path, caplog):
    config = llama(max_position_embeddings=8)
    with caplog.at_level(logging.WARNING):
        load(tmp_path, config, rows=[{"text": "a" * 9, "label": "no"}, ROWS[1]])
    assert "A text of data.path has 9 tokens, and the model was made for at most 8" in caplog.text


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path):
    rows = [{"text": "z", "label": "no"}, ROWS[1]]
    load(tmp_path, bert(vocab_size=29), rows=rows)
    with pytest.raises(ValueError, match=r"the tokenizer writes token 28 \('z'\), and the model knows 28"):
        load(tmp_path, bert(vocab_size=28), rows=rows)


def test_a_padding_token_beyond_the_vocabulary_is_refused(tmp_path):
    tokenizer = letters(pad_token="?")  # token 29
    with pytest.raises(ValueError, match=r"the tokenizer writes token 29 \('\?'\), and the model knows 29"):
        load(tmp_path, bert(vocab_size=29), tokenizer)


# ---- padding ----
def llama(**options):
    return LlamaConfig(**TINY | {"architectures": ["LlamaModel"]} | options)


@pytest.mark.parametrize(
    ("tokenizer", "config", "pads_with", "values"),
    [
        ({}, 0, 0, {}),
        ({}, None, 0, {"pad_token_id": 0}),
        ({"pad_token": None}, 1, 1, {}),
        ({"pad_token": None}, None, 2, {"pad_token_id": 2}),  # the end-of-text token
    ],
)
def test_the_tokenizer_and_the_model_agree_about_padding(tokenizer, config, pads_with, values):
    given = letters(**tokenizer)
    before = given.pad_token
    padding, found = padding_of(given, llama(pad_token_id=config))
    assert padding.pad_token_id == pads_with
    assert found == values
    assert given.pad_token == before


def test_without_any_token_that_could_pad_the_way_out_is_named():
    with pytest.raises(ValueError, match=r"Set tokenizer.pad_token and config.pad_token_id, and save both"):
        padding_of(letters(pad_token=None, eos_token=None), llama(pad_token_id=None))


def test_a_decoder_that_takes_another_token_as_padding_is_refused():
    with pytest.raises(ValueError, match="the tokenizer pads with token 0, and the model takes 2 as padding"):
        padding_of(letters(), llama(pad_token_id=2))
    padding_of(letters(), bert(pad_token_id=2))  # an encoder reads the attention mask instead


def test_a_padded_batch_of_a_decoder_is_classified_as_its_texts_alone(tmp_path):
    config = llama(pad_token_id=None, num_labels=2)
    examples = load(tmp_path, config, letters(pad_token=None))
    model = tiny_llama(LlamaForSequenceClassification, pad_token_id=None, num_labels=2)
    model.config.update(examples.config)
    rows = [examples.train[0], examples.train[1]]
    inputs = [
        {key: value for key, value in examples.collate(batch).items() if key != "labels"}
        for batch in (rows, *([row] for row in rows))
    ]
    with torch.no_grad():
        together, *alone = (model(**batch).logits for batch in inputs)
    torch.testing.assert_close(together, torch.cat(alone))


# ---- samples ----
def test_samples_are_held_out_texts_with_what_each_model_predicts(tmp_path):
    rows = [{"text": "abc " * 200 if i == 0 else "ab", "label": ["no", "yes"][i % 2]} for i in range(10)]
    examples = load(tmp_path, llama(pad_token_id=0, num_labels=2, max_position_embeddings=1000), rows=rows)
    options = SimpleNamespace(samples=2, prompt="", new_tokens=0)
    samples = TASK.samples(examples, letters(), options)
    assert [sample["label"] for sample in samples] == ["no", "yes"]
    assert len(samples[0]["input"]) == 400
    model = tiny_llama(LlamaForSequenceClassification, num_labels=2)
    answered = TASK.answers(
        TASK.answers(samples, "dense", model, None, examples, options), "pruned", model, None, examples, options
    )
    assert samples[0]["outputs"] == {}
    for sample in answered:
        assert sample["outputs"]["dense"] == sample["outputs"]["pruned"]
        assert 0.5 <= sample["probabilities"]["dense"] <= 1
    assert TASK.samples(examples, letters(), SimpleNamespace(samples=0)) == []
