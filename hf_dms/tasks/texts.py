"""Texts of rows (from a column, a chat or a template), checked cell by cell; and checks of their tokens."""

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
    """Apply a function to the texts of a source, and return a `datasets.Dataset` in memory. Each text is read once.

    Args:
        source: the rows.
        config: the `data` section, which says where a row has its text.
        tokenizer: the tokenizer; its chat template is applied to chats.
        encode: function of the texts of a batch (None for a cell without a value) and their places in the source. It
            returns the columns of the result.
        options: options of `Dataset.map`.
    """
    if config.template is None:
        source.check_column(config, "text_column")
    columns = source.rows.column_names if config.template is not None else [config.text_column]

    def encode_batch(batch: dict[str, list], places: list[int]) -> Any:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        return encode([_text(row, place, source, config, tokenizer) for row, place in zip(rows, places)], places)

    # Without the other columns: `encode_batch` takes all values of a batch, and images would be decoded for that.
    return source.rows.select_columns(columns).map(
        encode_batch,
        with_indices=True,
        batched=True,
        remove_columns=columns,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="tokens",  # nothing is cached on disk, so no hash of the tokenizer is needed
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
            f"{source.cell(place, config.text_column)} holds {value!r:.60}, which is not text. Name the column with "
            "the text in data.text_column, or make a text from columns with data.template."
        )
    try:
        return tokenizer.apply_chat_template(value, tokenize=False)
    except Exception as error:  # templates are programs, and can raise any error
        raise HfDmsError(
            f"{source.cell(place, config.text_column)} is not a chat for the tokenizer's chat template ({error})."
        ) from error


def _filled(template: str, row: dict[str, Any], place: int, source: Source) -> str:
    try:
        return template.format(**{column: "" if value is None else value for column, value in row.items()})
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise HfDmsError(
            f"data.template: {template!r} cannot be filled ({type(error).__name__}: {error}). The data has "
            f"columns {', '.join(row)}; this was row {place + 1} of {source.path}. Double the braces that are part of "
            "the text."
        ) from error


# ---- limits of a model -----------------------------------------------------------------------------------------------
def check_ids(largest: int, tokenizer: Any, config: Any) -> None:
    """Check that a tokenizer's ids are in the model's vocabulary.

    Args:
        largest: the largest id that occurs.
        tokenizer: the model's tokenizer.
        config: the model's config.

    Raises:
        HfDmsError: the id is beyond the vocabulary.
    """
    known = num_token_ids(config)
    if known is not None and largest >= known:
        raise HfDmsError(
            f"model.path: the tokenizer writes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the "
            f"model knows {known}, 0 to {known - 1}. Give the model its own tokenizer, or resize its embeddings to the "
            "tokenizer's length and save it."
        )


def check_length(tokens: int, what: str, config: Any) -> None:
    """Warn if texts are longer than a model was made for, and refuse them if it has no positions for them.

    Args:
        tokens: tokens of the longest text.
        what: what has that many tokens, such as `data.sequence_length is`.
        config: the model's config.

    Raises:
        HfDmsError: the model has a table of positions, and the text is longer.
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
    """A tokenizer that can pad a batch, and the values that the model's config needs to recognise the padding.

    A decoder with a classification head reads the last token that is not padding, so it must know the padding token. If
    there is none, the end-of-text token is used.

    Args:
        tokenizer: the model's tokenizer; it is not modified.
        config: the model's config.

    Raises:
        HfDmsError: there is no token to pad with, or tokenizer and model have different padding tokens.
    """
    known = config.get_text_config().pad_token_id
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is None:
            raise HfDmsError(
                "model.path: neither the tokenizer nor the model has a padding token, and there is no "
                "end-of-text token to use. Set tokenizer.pad_token and config.pad_token_id, and save both."
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = token
    if known is None:
        return tokenizer, {"pad_token_id": tokenizer.pad_token_id}
    # Encoders, which have tables of positions, read their first token, and the mask hides padding from it.
    if may_be_longer(config) and known != tokenizer.pad_token_id:
        raise HfDmsError(
            f"model.path: the tokenizer pads with token {tokenizer.pad_token_id}, and the model takes {known} "
            "as padding (pad_token_id in config.json), so it would read its answer off a padding token. "
            "Make both the same."
        )
    return tokenizer, {}
