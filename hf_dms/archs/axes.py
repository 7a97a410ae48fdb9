"""Axis strings: which dims the axes of a parameter are made of, in the notation of einops.

`"(kv rep d) hidden"` has two axes. The first one is a product of three dims, of which the last varies fastest. A sum,
`"out (a + b)"`, is an axis with one dim after the other, as in a map that reads `torch.cat((x, y))`.
"""

from __future__ import annotations

import functools
import itertools
import re

Term = tuple[str, ...]  # a product of dims
Axis = tuple[str, ...]  # a product, `("kv", "rep", "d")`, or several one after the other, `("a", "+", "b")`
Axes = tuple[Axis, ...]

PRODUCT = r"\w+( \w+)*"
AXIS = rf"(\w+|\({PRODUCT}( \+ {PRODUCT})*\))"
LINE = re.compile(rf"{AXIS}( {AXIS})*( @ \w+)?")  # the axes of a parameter, and how often its map runs


@functools.cache  # all layers share a few texts, and every bind, count and cut asks for those of every parameter
def parse_axes(text: str) -> Axes:
    """`"(kv rep d) (a + b)"` → `(("kv", "rep", "d"), ("a", "+", "b"))`. The part after an @ is ignored."""
    return tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", text.partition("@")[0]))


@functools.cache
def terms(axis: Axis) -> tuple[Term, ...]:
    """The products of dims that follow each other on an axis, usually one.

    Examples:
        >>> terms(("kv", "rep", "d"))
        (('kv', 'rep', 'd'),)
        >>> terms(("a", "+", "four", "b"))
        (('a',), ('four', 'b'))
    """
    return tuple(tuple(product.split()) for product in " ".join(axis).split("+"))


@functools.cache
def products(axes: Axes) -> tuple[Term, ...]:
    """The products of dims whose sum is the number of entries of a tensor.

    Examples:
        >>> products((("out",), ("a", "+", "b")))  # out·(a + b)
        (('out', 'a'), ('out', 'b'))
    """
    return tuple(tuple(itertools.chain(*factors)) for factors in itertools.product(*map(terms, axes)))


def flat(axes: Axes) -> tuple[str, ...]:
    """All dims of a parameter's axes, in order."""
    return tuple(name for axis in axes for name in axis if name != "+")
