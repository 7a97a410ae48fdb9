"""Texts of rows, and their tokens: what a column, a chat or a template makes of a row, checked cell by cell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from ..archs.inputs import max_tokens, may_be_longer, num_token_ids
from ..errors import HfDmsError
from .data import DataConfig
from .sources import Source

logger = logging.get_logger(__name__)


def map_texts(
    source: Source,
    config: DataConfig,
    tokenizer: Any,
    encode: Callable[[list[str | None], list[int]], Any],
    **options: Any,
) -> Any:
    """What a function makes of the texts of a source, as a `datasets.Dataset` in memory; each text is read once.

    Args:
        source: the rows.
        config: where a row has its text.
        tokenizer: whose chat template is applied to chats.
        encode: the columns of a batch, from its texts (None for a cell without a value) and their places in the source.
        options: of `Dataset.map`.
    """
    if config.template is None:
        source.check_column(config, "text_column")
    columns = source.rows.column_names if config.template is not None else [config.text_column]

    def encode_batch(batch: dict[str, list], places: list[int]) -> Any:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        return encode([_text(row, place, source, config, tokenizer) for row, place in zip(rows, places)], places)

    return source.rows.select_columns(columns).map(
        encode_batch,
        with_indices=True,
        batched=True,
        remove_columns=columns,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="tokens",  # nothing is cached on disk, so nothing needs a hash of the tokenizer
        **options,
    )


def _text(row: dict[str, Any], place: int, source: Source, config: DataConfig, tokenizer: Any) -> str | None:
    if config.template is not None:
        return _filled(config.template, row, place, source)
    value = row[config.text_column]
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise HfDmsError(
            f"{source.cell(place, config.text_column)} holds {value!r:.60}, which is no text. Name the column with the "
            "text in data.text_column, or make text of it by data.template."
        )
    try:
        return tokenizer.apply_chat_template(value, tokenize=False)
    except Exception as error:  # templates are programs, they raise anything
        raise HfDmsError(
            f"{source.cell(place, config.text_column)} is no chat that the tokenizer's chat template takes ({error})."
        ) from error


def _filled(template: str, row: dict[str, Any], place: int, source: Source) -> str:
    try:
        return template.format(**{column: "" if value is None else value for column, value in row.items()})
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise HfDmsError(
            f"data.template: {template!r} cannot be filled ({type(error).__name__}: {error}). The data has "
            f"columns {', '.join(row)}; this was row {place + 1} of {source.path}. Write braces that are meant as such "
            "twice."
        ) from error


# ---- what fits a model -----------------------------------------------------------------------------------------------
def check_ids(largest: int, tokenizer: Any, config: Any) -> None:
    """Check that a model knows the token ids of its tokenizer.

    Args:
        largest: the largest id that occurs.
        tokenizer: the model's.
        config: the model's.

    Raises:
        HfDmsError: the id is beyond the model's vocabulary.
    """
    known = num_token_ids(config)
    if known is not None and largest >= known:
        raise HfDmsError(
            f"model.path: the tokenizer writes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the "
            f"model knows {known}, 0 to {known - 1}. Give the model its own tokenizer, or resize its embeddings to the "
            "tokenizer's length and save it."
        )


def check_length(tokens: int, what: str, config: Any) -> None:
    """Warn of texts that are longer than those a model was trained on; refuse those that it has no positions for.

    Args:
        tokens: of the longest text.
        what: that has so many, such as `data.sequence_length is`.
        config: the model's.
    """
    longest = max_tokens(config)
    if longest is None or tokens <= longest:
        return
    if not may_be_longer(config):
        raise HfDmsError(
            f"{what} {tokens} tokens, and the model has positions for {longest}. Set data.sequence_length to at most "
            f"{longest}, which cuts longer texts off."
        )
    logger.warning(
        f"{what} {tokens} tokens, and the model was made for at most {longest}: what is measured beyond them says "
        "little about its quality."
    )


def padding_of(tokenizer: Any, config: Any) -> tuple[Any, dict[str, int]]:
    """A tokenizer that can pad a batch, and what the model's config must say so that the model sees the padding.

    A decoder with a classification head reads the last token that is not padding. Without a padding token the
    end-of-text token pads.

    Args:
        tokenizer: the model's; stays as it is.
        config: the model's.

    Raises:
        HfDmsError: there is no token that could pad, or the tokenizer and the model disagree about it.
    """
    known = config.get_text_config().pad_token_id
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is None:
            raise HfDmsError(
                "model.path: neither the tokenizer nor the model has a padding token, and there is no "
                "end-of-text token to take. Set tokenizer.pad_token and config.pad_token_id, and save both."
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = token
    if known is None:
        return tokenizer, {"pad_token_id": tokenizer.pad_token_id}
    if may_be_longer(config) and known != tokenizer.pad_token_id:
        raise HfDmsError(
            f"model.path: the tokenizer pads with token {tokenizer.pad_token_id}, and the model takes {known} "
            "as padding (pad_token_id in config.json), so it would read its answer off a padding token. "
            "Make both the same."
        )
    return tokenizer, {}
