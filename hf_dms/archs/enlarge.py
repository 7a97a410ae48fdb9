"""A larger config of the same architecture: the supernet that pipeline np searches in.

Widths are multiplied by one factor and numbers of layers by another. Sizes that a search cannot cut do not change: the
size of a head, the stem of a ResNet-50, a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from transformers import PreTrainedConfig

from ..errors import HfDmsError
from .bind import sized
from .registry import spec_for
from .spec import ArchSpec
from .stock import config_values, held_by_fixed, product_of, prunable_factor, with_values


def enlarged_config(
    config: PreTrainedConfig, width: float, depth: float, dims: Collection[str] | None = None
) -> PreTrainedConfig:
    """A copy of a config with larger sizes, rounded to whole numbers (halves up).

    Where the stock config ties sizes to each other, the size that follows can be a little larger than its factor says:
    Llama's hidden size is a multiple of its heads, and BERT's is heads · head size.

    Args:
        config: config of the original model.
        width: factor for all widths (heads and KV groups, MLPs, residual streams) in every stage, at least 1.
        depth: factor for the numbers of layers, at least 1.
        dims: names of the dims that grow: those that the search prunes. Default: all that can be pruned.

    Raises:
        ValueError: a factor is below 1, or no stock config of the architecture has these sizes.
    """
    for name, factor in (("width", width), ("depth", depth)):
        # A bool is an int in Python, and YAML reads `yes` as true.
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
            raise HfDmsError(f"supernet.{name} must be a factor of at least 1, got {factor!r}.")
    spec, before = sized(spec_for(config), config)
    if spec.per_layer_only:
        raise HfDmsError(
            f"supernet: the stock config of {spec.model_type} does not hold all widths, its class derives them. "
            "Search from a config whose own factors are larger, without a supernet."
        )
    held = held_by_fixed(spec)  # tied to a size that does not grow
    growing = [name for name in spec.prunable if name not in held and (dims is None or name in dims)]
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
    """Change sizes that the stock config ties to others, in place, so that the ties hold.

    Raises:
        ValueError: a size that would have to change may not grow.
    """
    for product, whole in spec.must_equal:
        size, other = product_of(sizes, product), prunable_factor(spec, product)
        if sizes[whole] != size and not {whole, other} <= {*growing}:
            raise HfDmsError(
                f"supernet: the stock config of {spec.model_type} ties {whole} to {other}, and only one of the two is "
                "pruned, so that only one would grow. Let dms.prune name both, or neither."
            )
        sizes[whole] = size
    # Afterwards, since `must_equal` may have changed what has to be divided. Up, so that nothing gets less than asked.
    for product, whole in spec.must_divide:
        divisor = product_of(sizes, product)
        multiple = -(-sizes[whole] // divisor) * divisor
        if multiple != sizes[whole] and whole not in growing:
            raise HfDmsError(
                f"supernet: {whole} = {sizes[whole]} is not a multiple of {divisor}, which the stock config of "
                f"{spec.model_type} needs. Let dms.prune name {whole} too, or choose another width."
            )
        sizes[whole] = multiple


def _with_sizes(
    config: PreTrainedConfig, spec: ArchSpec, before: dict[str, int], sizes: dict[str, int]
) -> PreTrainedConfig:
    """A copy of a config with other sizes.

    Raises:
        ValueError: the stock config cannot express them.
    """
    values = with_values(config.to_dict(), config_values(spec, sizes))
    values |= {key: values[over] // values[under] for key, (over, under) in spec.config_ratios.items()}
    for key in spec.config_leaves_out:
        values.pop(key, None)
    for key in spec.config_lists:  # lists with an entry per layer: repeat the pattern
        if isinstance(values.get(key), list) and values[key]:
            (stack,) = spec.stacks
            values[key] = [values[key][layer % before[stack]] for layer in range(sizes[stack])]
    try:
        enlarged = type(config).from_dict(values)
        found = sized(spec_for(enlarged), enlarged)[1]
    except (ValueError, TypeError) as error:
        raise _not_held(spec, sizes) from error
    leading = [dim.name for dim in spec.dims if dim.follows is None]
    # A config can accept values and still build other sizes from them.
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
