"""The cost of a bound model as a polynomial of its dims: parameters, multiply-accumulates, key-value bytes."""

from __future__ import annotations

from collections import defaultdict
from math import prod

import torch
from torch import Tensor, nn

from ..errors import HfDmsError
from ..resource import Cost, Monomial
from .axes import products
from .bind import BoundSpec, compiled
from .plain_view import plain_module, submodule
from .positions import Recorded, recorded_run


def build_cost(bound: BoundSpec, model: nn.Module, resource: str, scope: str, sequence_length: int | None) -> Cost:
    """The cost of a bound model as a polynomial of its dims.

    - params: every parameter, tied ones once.
    - macs: multiply-accumulates per token, that is, those of a sequence divided by its length. They include all
      `nn.Linear`, all convolutions, and the attention scores over the full square of the sequence, or of each of its
      windows. Embedding lookups, norms, activations and rotary embeddings are not counted. A sequence has
      `sequence_length` tokens, or as many as the architecture says: the patches of an image, or one for a network in
      stages.
    - kv_bytes: bytes of keys and values per token, in the model's dtype.

    Args:
        bound: the architecture, bound to the model.
        model: the model; the meta device will do.
        resource: params, macs or kv_bytes.
        scope: model, or layers for the cost of the layers only.
        sequence_length: tokens per sequence, needed for the macs of text models.

    Raises:
        ValueError: the resource is kv_bytes and the model has no cache, or macs without a sequence length.
    """
    terms = {"params": _param_terms, "macs": _mac_terms, "kv_bytes": _cache_terms}[resource](
        bound, model, sequence_length
    )
    outside: dict[Monomial, float] = defaultdict(float)
    layered: dict[str, dict[Monomial, Tensor]] = {stack: {} for stack in bound.stacks}
    for factors, coefficient, stack, layer in terms:
        # Fixed sizes go into the coefficient, so the polynomial has only what a search can change.
        monomial, number = bound.monomial(factors)
        if stack is None:
            outside[monomial] += coefficient * number
        else:
            # One coefficient per layer: the first block of a stage, say, has other parameters than the rest.
            zeros = torch.zeros(bound.sizes[stack], dtype=torch.float64)
            layered[stack].setdefault(monomial, zeros)[layer] += coefficient * number
    cost = Cost(dict(outside), layered)
    return cost.layers_only() if scope == "layers" else cost


def _param_terms(bound: BoundSpec, model: nn.Module, sequence_length: int | None):
    for name, param in bound.params.items():
        if name not in bound.tied:
            for factors in products(param.axes):
                yield factors, 1.0, param.stack, param.layer


def _mac_terms(bound: BoundSpec, model: nn.Module, sequence_length: int | None):
    if bound.spec.tokens:
        sequence_length = bound.product(bound.spec.tokens)
    if sequence_length is None:
        raise HfDmsError("resource macs needs dms.sequence_length: the number of tokens per sequence.")
    recorded = recorded_run(bound, model) if bound.spec.records_positions else Recorded({}, {})
    for name, param in bound.params.items():
        module_path, _, leaf = name.rpartition(".")
        # Counted below, as one number: what stays whole costs the same at any size of the rest.
        if bound.is_whole(name):
            continue
        # A map runs once per token, unless a run on the meta device or the description says how often it runs. Norms
        # and embeddings have weights too, but multiply no matrices.
        if leaf == "weight" and isinstance(plain_module(submodule(model, module_path)), (nn.Linear, nn.Conv2d)):
            positions = recorded.positions.get(module_path, param.positions)
            share = 1.0 if positions is None else positions / sequence_length
            for factors in products(param.axes):
                yield factors, share, param.stack, param.layer
    if bound.spec.attention:
        for layer in range(bound.num_layers):
            # Scores and weighted values: two products with every token of the sequence.
            yield tuple(bound.spec.attention.split()), 2.0 * sequence_length, bound.depth, layer
    for path in bound.spec.whole:
        yield (), recorded.macs_of(bound.prefix + path) / sequence_length, None, None
    for product, macs, stack, layer in _attention_macs(bound, recorded):
        factors = tuple(product.split())
        yield factors, macs / bound.product(factors) / sequence_length, stack, layer


def _attention_macs(bound: BoundSpec, recorded: Recorded):
    """Of every module in `attentions`: its product of dims, the MACs of its attention scores, its stack and layer."""
    maps = {path: bound.params[f"{path}.weight"].axes for path in recorded.positions if not bound.is_whole(f"{path}.")}
    in_maps = {path: recorded.positions[path] * prod(map(bound.product, axes)) for path, axes in maps.items()}
    for pattern, product in bound.spec.attentions.items():
        for path, macs in recorded.macs.items():
            if compiled(pattern).fullmatch(path.removeprefix(bound.prefix)):
                # What torch counted in the module includes its linear maps. They are terms of their own.
                own = sum(count for inner, count in in_maps.items() if inner.startswith(f"{path}."))
                yield product, macs - own, *bound.layer_of(path)


def _cache_terms(bound: BoundSpec, model: nn.Module, sequence_length: int | None):
    if bound.spec.cache is None:
        raise HfDmsError(
            f"resource kv_bytes: {bound.spec.model_type} keeps no key-value cache. Use resource: params or macs."
        )
    bytes_per_number = next(model.parameters()).dtype.itemsize
    for layer in range(bound.num_layers):
        # Keys and values.
        yield tuple(bound.spec.cache.split()), 2.0 * bytes_per_number, bound.depth, layer
