"""A model without weights, as its class and config build it; and models that are tied otherwise than their config says.

A config can say that the output embedding is the input embedding while the file holds two different tensors, as after
some merges. `from_pretrained` then keeps both, and so does everything here: parameters count as tied if they share a
tensor.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from ..errors import HfDmsError
from .plain_view import names_by_tensor


def skeleton(cls: Any, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the meta device, tied as its config says, without initialising weights.

    Args:
        cls: the model class.
        config: its config; the model gets a copy.
        dtype: precision of the parameters. Default: the config's.
    """
    # A copy, because the model keeps the config, and its dtype is written into it.
    with torch.device("meta"), initialization.no_init_weights():
        model = cls._from_config(copy.deepcopy(config), **({} if dtype is None else {"dtype": dtype}))
    model.tie_weights()  # otherwise a part of the initialisation
    return model


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Context: models on the meta device run even where they look at values, as the masks of attention do.

    For fake tensors, transformers does not look at values, and makes the mask.
    """
    # torch logs the traceback of an operation that fails, beside raising an error. The error alone is enough.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = disabled


def attention_of(model: PreTrainedModel) -> str | dict[str, str]:
    """The attention implementation of a model; if its config holds others, also theirs, by their names in it."""
    config = model.config
    inner = {name: getattr(config, name)._attn_implementation for name in config.sub_configs if getattr(config, name)}
    # transformers takes such a mapping back, with "" for the model itself.
    return {"": config._attn_implementation} | inner if inner else config._attn_implementation


def untied_names(model: PreTrainedModel, built: PreTrainedModel | None = None) -> list[str]:
    """Names of parameters that the config ties to another one, but that are separate tensors in the model.

    Args:
        model: the model.
        built: its skeleton, if there is one already.

    Raises:
        ValueError: the config ties several tensors, and only some of them are tied in the model.
    """
    if built is None and not _ties(model):
        return []
    built = skeleton(type(model), model.config) if built is None else built
    # Tensors with several names are tied. In the model they must be the same tensor under all of these names.
    groups = [names for names in names_by_tensor(built).values() if len(names) > 1]
    owners = {name: tensor for tensor, names in names_by_tensor(model).items() for name in names}
    apart = [[name for name in names[1:] if owners.get(name) != owners.get(names[0])] for names in groups]
    if any(apart) and [names[1:] for names in groups] != apart:
        tied = next(name for names, own in zip(groups, apart) for name in names[1:] if name not in own)
        raise HfDmsError(
            f"tie_word_embeddings is true in this model's config, but {_first(apart)} is a tensor of its own, while "
            f"'{tied}' is tied. Give it a tensor of its own too: a copy of the one that it is tied to."
        )
    return [name for own in apart for name in own]


def config_as_tied(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of a model's config with `tie_word_embeddings` as it is in the model.

    Raises:
        ValueError: see `untied_names`.
    """
    config = copy.deepcopy(model.config)
    if untied_names(model):
        config.tie_word_embeddings = False
    return config


def _ties(model: PreTrainedModel) -> bool:
    """Whether a config of the model, or of a model in it, ties tensors."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return any(each._tied_weights_keys and getattr(each.config, "tie_word_embeddings", False) for each in models)


def _first(apart: list[list[str]]) -> str:
    return f"'{next(name for own in apart for name in own)}'"
