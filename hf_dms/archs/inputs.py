"""Limits on a model's inputs from its config: token ids, number of positions, shape of images."""

from __future__ import annotations

from typing import Any

POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")  # their positions start after the padding id
INTERPOLATES = ("dinov2",)  # these take images of any size


def num_token_ids(config: Any) -> int | None:
    """Size of a model's vocabulary (ids 0 to this number minus 1); None if it does not read tokens."""
    return getattr(config.get_text_config(), "vocab_size", None)


def max_tokens(config: Any) -> int | None:
    """The largest number of tokens that a model was made for; None if its config does not say."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and _plain_type(text) in POSITIONS_AFTER_PADDING:
        return positions - text.pad_token_id - 1
    return positions


def may_be_longer(config: Any) -> bool:
    """Whether a model computes more than `max_tokens` tokens: rotary positions can, a table of positions cannot."""
    return getattr(config.get_text_config(), "rope_parameters", None) is not None


def image_shape(config: Any) -> tuple[int, int | None, int | None]:
    """Channels, height and width of a model's images; height and width are None if any size is allowed."""
    # RT-DETR's config has no number of channels; that of its backbone has.
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    if size is None or _plain_type(config) in INTERPOLATES:
        return channels, None, None
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _plain_type(config: Any) -> str:
    return config.model_type.removeprefix("dms_")
