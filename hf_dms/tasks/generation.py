"""text-generation: documents packed into windows of equal length, and perplexity on them.

The documents are one stream of tokens, each followed by the end-of-text token. The stream is cut into windows that do
not overlap. Some tokenizers begin every text with a token (BOS; Llama, Gemma), and their models never saw a text
without it. So each document begins with it, and so does each window. A window that begins inside a document holds one
token of text less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import PreTrainedModel, default_data_collator

from ..errors import HfDmsError
from .data import DataConfig
from .evaluate import example_scores
from .sources import Source, load_sources
from .task import Examples, Sample, SampleOptions, Task
from .texts import check_ids, check_length, map_texts


class TooFewTokens(HfDmsError):
    """A text is shorter than one window."""


@dataclass(frozen=True)
class Streams:
    """Documents as streams of tokens.

    Attributes:
        train, held_out: `[tokens]` int64.
        start: the token at the start of every window; None if there is none.
    """

    train: Tensor
    held_out: Tensor
    start: int | None


def load_examples(config: DataConfig, tokenizer: Any, model_config: Any, labels: Any = None) -> Examples:
    """Packed windows to train on and to measure on; see `Task.load`."""
    check_length(config.sequence_length, "data.sequence_length is", model_config)
    examples = windows_of(load_streams(config, tokenizer, model_config), config.sequence_length)
    others = [_windows_of_source(config, path, tokenizer, model_config) for path in config.mix]
    if not others:
        return examples
    rows = mixed([examples.train, *others], [1.0, *config.mix.values()])
    return dataclasses.replace(examples, train=rows)


def _windows_of_source(config: DataConfig, path: str, tokenizer: Any, model_config: Any) -> Any:
    """All windows of a further source, as a dataset; errors name it in place of data.path."""
    # `held_out=path` takes all of it: nothing is measured on a further text.
    source = DataConfig(path=path, held_out=path, sequence_length=config.sequence_length)
    try:
        streams = load_streams(source, tokenizer, model_config)
        return as_dataset(pack(streams.train, config.sequence_length, "data.path", streams.start))
    except HfDmsError as error:
        name, reason = f"data.mix.{path}", str(error)
        raise HfDmsError(reason.replace("data.path", name) if "data.path" in reason else f"{name}: {reason}") from error


def mixed(sources: Sequence[Any], weights: Sequence[float]) -> Any:
    """Mix several datasets by weight into one, and shuffle it. All rows of the first dataset occur once.

    It is shuffled because `evenly_spaced` could otherwise pick rows of one source only.

    Args:
        sources: datasets of the library `datasets`. All but the first start again from the beginning when they end.
        weights: how often rows of each occur, relative to the others.

    Example:
        With a source of two rows and weight 1, and a source of three rows and weight 2, the result has rows 0, 1 of
        the first and rows 0, 1, 2, 0 of the second.
    """
    from datasets import concatenate_datasets

    places, start = [], 0
    for source, weight in zip(sources, weights):
        share = round(len(sources[0]) * weight / weights[0])
        places.append(start + torch.arange(max(share, 1)) % len(source))
        start += len(source)
    rows = torch.cat(places)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return concatenate_datasets(list(sources)).select(rows[order].tolist()).with_format("torch")


def windows_of(streams: Streams, sequence_length: int) -> Examples:
    """Examples of a length from streams that were tokenised once.

    Raises:
        TooFewTokens: a stream is shorter than one window.
    """
    train = pack(streams.train, sequence_length, "data.path", streams.start)
    held_out = pack(streams.held_out, sequence_length, "data.held_out", streams.start)
    unit = f"sequences of {sequence_length} tokens"
    return Examples(as_dataset(train), as_dataset(held_out), default_data_collator, (), unit)


def load_streams(config: DataConfig, tokenizer: Any, model_config: Any = None) -> Streams:
    """Tokenise the text of a recipe, once.

    Args:
        config: the `data` section.
        tokenizer: the model's tokenizer.
        model_config: the model's config, to check token ids; None skips that check.

    Raises:
        HfDmsError: there is no text, or a token id is beyond the model's vocabulary.
    """
    train_source, held_out_source = load_sources(config)
    start = start_token(tokenizer)
    train = _tokens(train_source, config, tokenizer, start)
    if held_out_source is None:
        # The end of the stream, not random windows: neighbouring windows of one document would be in both parts.
        place = int(len(train) * (1 - float(config.held_out)))
        train, held_out = train[:place], train[place:]
    else:
        same = held_out_source is train_source
        held_out = train if same else _tokens(held_out_source, config, tokenizer, start)
    if model_config is not None:
        check_ids(max(int(part.max()) for part in (train, held_out) if len(part)), tokenizer, model_config)
    return Streams(train, held_out, start)


def load_sequences(config: DataConfig, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Packed token sequences to search on and to evaluate on.

    Args:
        config: the `data` section.
        tokenizer: the model's tokenizer.

    Returns:
        Two `[sequences, sequence_length]` int64 tensors.

    Raises:
        HfDmsError: there is no text, or not enough for one sequence.
    """
    streams, length = load_streams(config, tokenizer), config.sequence_length
    return (
        pack(streams.train, length, "data.path", streams.start),
        pack(streams.held_out, length, "data.held_out", streams.start),
    )


def start_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text (BOS); None if it puts none."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else None


def pack(tokens: Tensor, sequence_length: int, source: str = "data", start: int | None = None) -> Tensor:
    """Cut a stream of tokens into sequences. The rest at the end is dropped.

    Args:
        tokens: `[tokens]`.
        sequence_length: tokens per sequence.
        source: name of the stream in an error.
        start: a token that every sequence must begin with. It is inserted where a sequence begins with another token.

    Returns:
        `[sequences, sequence_length]`.

    Raises:
        TooFewTokens: the stream is shorter than one sequence.

    Examples:
        >>> pack(torch.tensor([1, 5, 6, 7, 8, 9]), 3, start=1)
        tensor([[1, 5, 6],
                [1, 7, 8]])
    """
    places, place = [], 0
    while (end := place + sequence_length - _lacks(start, tokens, place)) <= len(tokens):
        places.append(place)
        place = end
    if not places:
        raise TooFewTokens(
            f"{source} has {len(tokens)} tokens, less than one sequence of {sequence_length}. "
            "Give more text, or a larger share of it, or lower data.sequence_length."
        )
    if start is None:
        return tokens[:place].view(-1, sequence_length)
    first = torch.tensor([start])
    rows = [tokens[at : at + sequence_length] for at in places]
    return torch.stack([row if row[0] == start else torch.cat([first, row[: sequence_length - 1]]) for row in rows])


def _lacks(start: int | None, tokens: Tensor, place: int) -> bool:
    return start is not None and place < len(tokens) and int(tokens[place]) != start


def as_dataset(sequences: Tensor) -> Any:
    """Sequences as a `datasets.Dataset` of a causal model's arguments. The labels are the tokens themselves."""
    from datasets import Dataset

    # The model shifts the labels itself.
    rows = sequences.numpy()
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def _tokens(source: Source, config: DataConfig, tokenizer: Any, start: int | None) -> Tensor:
    """All documents of a source as one stream of tokens, each with the tokens that begin and end a text."""
    from datasets import Features, List, Value

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(texts: list[str | None], places: list[int]) -> dict[str, list]:
        documents = [text for text in texts if text]
        # Without special tokens: some tokenizers add an end, some a beginning, some neither. Both are added below,
        # alike for all.
        ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
        begin = [[start] if start is not None and each[:1] != [start] else [] for each in ids]  # chats can have one
        return {"input_ids": [[*first, *each, *end] for first, each in zip(begin, ids)]}

    # int32, because `datasets` would store Python integers as int64, twice as large.
    documents = map_texts(source, config, tokenizer, encode, features=Features({"input_ids": List(Value("int32"))}))
    if not len(documents):
        what = f"column '{config.text_column}'" if config.template is None else "what data.template makes of it"
        raise HfDmsError(f"{source.key}: {source.path} has no text in {what}.")
    # In Arrow too: as Python integers, the tokens would take many times the memory.
    flat = documents.data.column("input_ids").combine_chunks().flatten()
    return torch.from_numpy(flat.to_numpy(zero_copy_only=False).astype("int64"))


# ---- quality, speed, samples -----------------------------------------------------------------------------------------
def sequence_losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood per predicted token of each sequence, `[batch]` float64, in nats.

    Each sequence is scored separately, from its second token on, without context from the one before.

    Args:
        model: a causal language model.
        batch: `input_ids` `[batch, tokens]`, without padding.
    """
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()
    labels = F.pad(batch["input_ids"][:, 1:], (0, 1))  # slicing the logits would copy the largest tensor of all
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)[:, :-1].double().mean(1)


def continuation(model: PreTrainedModel, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """A language model's greedy continuation of a prompt, including the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    check_ids(int(inputs["input_ids"].max()), tokenizer, model.config)
    generate: Any = model.generate
    tokens = generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def prompts(examples: Examples, tokenizer: Any, options: SampleOptions) -> list[Sample]:
    """The recipe's prompts; see `Task.samples`."""
    texts = options.prompt if isinstance(options.prompt, list) else [options.prompt]
    return [{"input": prompt, "outputs": {}} for prompt in texts if prompt]


def continued(
    samples: list[Sample], name: str, model: PreTrainedModel, tokenizer: Any, examples: Examples, options: SampleOptions
) -> list[Sample]:
    """Each prompt with a model's continuation; see `Task.answers`."""
    texts = [continuation(model, tokenizer, sample["input"], options.new_tokens) for sample in samples]
    return [sample | {"outputs": sample["outputs"] | {name: text}} for sample, text in zip(samples, texts)]


TEXT_GENERATION = Task(
    name="text-generation",
    model_class="AutoModelForCausalLM",
    processor_class="AutoTokenizer",
    ending="ForCausalLM",
    peft="CAUSAL_LM",
    generates=True,
    metric="perplexity",
    log_scores=True,
    fewest_classes=0,
    num_held_out=64,
    speed=("tokens_per_second", "prefill tokens/s"),
    amount=lambda batch: batch["input_ids"].numel(),
    load=load_examples,
    score=sequence_losses,
    samples=prompts,
    answers=continued,
)


def perplexity(model: PreTrainedModel, sequences: Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood per predicted token, over sequences that do not overlap.

    Args:
        model: a causal language model. It runs in its current mode (training or evaluation).
        sequences: `[sequences, tokens]` int64.
        batch_size: sequences per forward pass.
    """
    examples = [{"input_ids": row} for row in sequences]
    return math.exp(float(example_scores(model, TEXT_GENERATION, examples, default_collate, batch_size).mean()))
