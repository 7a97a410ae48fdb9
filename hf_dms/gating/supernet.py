"""Pipeline np: a search in a larger network of random weights, for a result that costs as much as the original model.

`supernet` makes that network and converts the target to a share of its resource. The search itself is that of every
pipeline. Afterwards `fresh_weights_` gives the shape that was found new weights to train from.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..archs.bind import bind, for_config
from ..archs.enlarge import enlarged_config
from ..archs.registry import spec_for
from ..archs.skeleton import skeleton
from ..config import DMSConfig, amount
from ..errors import HfDmsError
from .gates_for import build_gates, for_stages


def supernet(
    model: PreTrainedModel, dms_config: DMSConfig, width: float = 1.0, depth: float = 1.0, seed: int = 0
) -> tuple[PreTrainedModel, DMSConfig]:
    """A larger network of random weights to search in, and the request for it.

    Args:
        model: the original model. Only its class and config are read; the meta device will do.
        dms_config: what to search. A fraction as target counts against the original model: 1.0 is its cost. An amount
            such as 100M may be more than that.
        width: factor for all widths that the request prunes, at least 1.
        depth: factor for the numbers of layers, at least 1.
        seed: seed of the weights.

    Returns:
        The network, on the CPU in the original's precision; and the request for `DMSTrainer` or `attach_`, with its
        target as a share of the network's resource.

    Raises:
        ValueError: the pipeline is not np, a factor is below 1, the stock config cannot express the sizes, or the
            target is more than the larger network has.

    Examples:
        >>> network, dms = supernet(model, DMSConfig(target=1.0, pipeline="np"), width=2, depth=1.5)
    """
    if dms_config.pipeline != "np":
        raise HfDmsError(
            f"A supernet has random weights, and dms.pipeline is {dms_config.pipeline}, which begins with pretrained "
            "ones. Write pipeline: np, or leave the supernet out."
        )
    config = supernet_config(model.config, dms_config, width, depth)
    target = target_in(dms_config, model, skeleton(type(model), config))
    return random_model(type(model), config, seed, model.dtype), replace(dms_config, target=target)


def supernet_config(config: PreTrainedConfig, dms_config: DMSConfig, width: float, depth: float) -> PreTrainedConfig:
    """The original's config with all dims that the request prunes enlarged; see `enlarged_config`."""
    spec = for_config(spec_for(config), config)
    request = for_stages(dms_config, spec)
    wanted = spec.prunable if request.prune is None else request.prune
    return enlarged_config(config, width, depth, set(wanted) - {*request.protect.get("dims", ())})


def target_in(dms_config: DMSConfig, original: PreTrainedModel, network: PreTrainedModel) -> float:
    """The target of a request as a share of a larger network's resource.

    Args:
        dms_config: the request; its target is a share of the original's resource, or an amount.
        original, network: both models; the meta device will do.

    Raises:
        ValueError: the larger network does not have more than the target.
    """
    target, whole = dms_config.target, dense_resource(network, dms_config)
    budget = amount(target) if isinstance(target, str) else target * dense_resource(original, dms_config)
    if budget >= whole:
        raise HfDmsError(
            f"dms.target = {target} means {budget / 1e6:.4g}M {dms_config.resource}, and the supernet has "
            f"{whole / 1e6:.4g}M: there is nothing to cut. Lower it, or raise model.supernet.width or depth."
        )
    share = budget / whole
    return share if share * whole >= budget else math.nextafter(share, 1.0)  # else rounding would exclude the original


def dense_resource(model: PreTrainedModel, dms_config: DMSConfig) -> float:
    """How much a model has, before pruning, of the resource that a request limits."""
    # Nothing of the request but the resource and its scope plays a part in the cost of the whole model. The rest is set
    # to what is valid for every model, so that no check of it fails here.
    count: dict[str, Any] = dict(target=1.0, prune=None, protect={}, round_to={}, layout="per_layer", strategy="dms")
    bound = bind(spec_for(model.config), model)
    return build_gates(bound, model, replace(dms_config, **count), device=torch.device("cpu")).dense_resource


def random_model(cls: Any, config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model with new weights as its class initialises them, on the CPU. torch's random state does not change.

    Args:
        cls: the model class.
        config: its config; the model gets a copy.
        seed: seed of the weights.
        dtype: precision of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the accelerators too, whose state is not restored here.
        torch.default_generator.manual_seed(seed)
        return cls._from_config(copy.deepcopy(config), dtype=dtype)


def fresh_weights_(model: PreTrainedModel, seed: int) -> None:
    """Give a model new random weights, and its batch norms new statistics, in place. Only the shape stays.

    Args:
        model: a plain model, such as `prune` returns. A model of layout padded does not suit: its zeros would become
            weights.
        seed: seed of the weights; the same seed gives the same weights on every device.
    """
    fresh = random_model(type(model), model.config, seed, model.dtype)
    model.load_state_dict(fresh.state_dict())
