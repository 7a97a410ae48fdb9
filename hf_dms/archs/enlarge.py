"""A larger config of the same architecture: the supernet that pipeline np searches in.

Widths are multiplied by one factor and numbers of layers by another. What a search cannot cut stays as it is: the size
of a head, the stem of a ResNet-50, a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from transformers import PreTrainedConfig

from ..errors import HfDmsError
from .bind import sized
from .registry import spec_for
from .spec import ArchSpec
from .stock import config_values, product_of, prunable_factor, with_values


def enlarged_config(
    config: PreTrainedConfig, width: float, depth: float, dims: Collection[str] | None = None
) -> PreTrainedConfig:
    """A copy of a config with larger sizes, whole ones: halves are rounded up.

    Where the stock config ties sizes to each other, the ones that follow are a little larger than their factor says:
    Llama's hidden size is a multiple of its heads, BERT's is heads · head size.

    Args:
        config: of the original model.
        width: factor of all widths, at least 1: heads and KV groups, MLPs, residual streams; of every stage.
        depth: factor of the numbers of layers, at least 1.
        dims: names of the dims that grow, as a search prunes them. Default: all that can be pruned.

    Raises:
        ValueError: a factor below 1, or sizes that no stock config of the architecture has.
    """
    for name, factor in (("width", width), ("depth", depth)):
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
            raise HfDmsError(f"supernet.{name} must be a factor of at least 1, got {factor!r}.")
    spec, before = sized(spec_for(config), config)
    if not spec.config:
        raise HfDmsError(
            f"supernet: the stock config of {spec.model_type} holds no widths that could grow, its class derives them. "
            "Search from a config whose own factors are larger, without a supernet."
        )
    growing = [name for name in spec.prunable if dims is None or name in dims]
    factors = {name: depth if spec.dim(name).scope == "depth" else width for name in growing}
    sizes = before | {name: math.floor(before[name] * factor + 0.5) for name, factor in factors.items()}
    if sizes == before:
        raise HfDmsError(
            f"supernet: width {width:g} and depth {depth:g} leave every size of this {spec.model_type} as it is "
            f"({_in_words(before, growing) or 'none may grow'}). Give larger factors, or let dms.prune name more dims."
        )
    _follow_(sizes, spec, growing)
    return _with_sizes(config, spec, before, sizes)


def _follow_(sizes: dict[str, int], spec: ArchSpec, growing: Collection[str]) -> None:
    """Let sizes that the stock config ties to others follow these, in place.

    Raises:
        ValueError: the one that would have to follow may not grow.
    """
    for product, whole in spec.must_equal:
        size, other = product_of(sizes, product), prunable_factor(spec, product)
        if sizes[whole] != size and not {whole, other} <= {*growing}:
            raise HfDmsError(
                f"supernet: the stock config of {spec.model_type} ties {whole} to {other}, and only one of the two is "
                "pruned, so that only one would grow. Let dms.prune name both, or neither."
            )
        sizes[whole] = size
    for product, whole in spec.must_divide:
        divisor = product_of(sizes, product)
        multiple = -(-sizes[whole] // divisor) * divisor
        if multiple != sizes[whole] and whole not in growing:
            raise HfDmsError(
                f"supernet: {whole} = {sizes[whole]} is no multiple of {divisor}, as the stock config of "
                f"{spec.model_type} needs it. Let dms.prune name {whole} too, or choose another width."
            )
        sizes[whole] = multiple


def _with_sizes(
    config: PreTrainedConfig, spec: ArchSpec, before: dict[str, int], sizes: dict[str, int]
) -> PreTrainedConfig:
    """A copy of a config with other sizes.

    Raises:
        ValueError: the config has no words for them.
    """
    values = with_values(config.to_dict(), config_values(spec, sizes))
    values |= {key: values[over] // values[under] for key, (over, under) in spec.config_ratios.items()}
    for key in spec.config_leaves_out:
        values.pop(key, None)
    for key in spec.config_lists:  # of the one stack of layers: the pattern goes on
        if isinstance(values.get(key), list) and values[key]:
            (stack,) = spec.stacks
            values[key] = [values[key][layer % before[stack]] for layer in range(sizes[stack])]
    try:
        enlarged = type(config).from_dict(values)
        found = sized(spec_for(enlarged), enlarged)[1]
    except (ValueError, TypeError) as error:
        raise _not_held(spec, sizes) from error
    leading = [dim.name for dim in spec.dims if dim.follows is None]
    if any(found.get(name) != sizes[name] for name in leading):
        raise _not_held(spec, sizes)
    return enlarged


def _not_held(spec: ArchSpec, sizes: dict[str, int]) -> HfDmsError:
    return HfDmsError(
        f"supernet: no stock config of {spec.model_type} has the sizes {_in_words(sizes, spec.prunable)}. Choose other "
        "factors, such as whole ones."
    )


def _in_words(sizes: dict[str, int], names: Collection[str]) -> str:
    return ", ".join(f"{name} {sizes[name]}" for name in names if name in sizes)
