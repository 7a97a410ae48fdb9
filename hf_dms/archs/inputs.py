"""What a model's config says about inputs: which token ids, how many positions, what images it takes."""

from __future__ import annotations

from typing import Any

POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")  # their first position is that after the padding id
INTERPOLATES = ("dinov2",)  # takes images of any size


def num_token_ids(config: Any) -> int | None:
    """How many token ids a model knows, 0 to this number minus 1; None if it reads no tokens."""
    return getattr(config.get_text_config(), "vocab_size", None)


def max_tokens(config: Any) -> int | None:
    """How many tokens a model was made for; None if its config does not say."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and _plain_type(text) in POSITIONS_AFTER_PADDING:
        return positions - text.pad_token_id - 1
    return positions


def may_be_longer(config: Any) -> bool:
    """Whether a model computes something for more than `max_tokens` tokens: rotary positions go on, a table ends."""
    return getattr(config.get_text_config(), "rope_parameters", None) is not None


def image_shape(config: Any) -> tuple[int, int | None, int | None]:
    """Channels, height and width of a model's images; None for a height and width that may be any."""
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    if size is None or _plain_type(config) in INTERPOLATES:
        return channels, None, None
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _plain_type(config: Any) -> str:
    return config.model_type.removeprefix("dms_")
