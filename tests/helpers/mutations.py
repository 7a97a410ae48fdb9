"""Small damage to valid inputs, drawn by hypothesis: to values in a tree (YAML, JSON), to characters, to bytes."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NASTY = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 0.5, -0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", " ", "x", "0.5", "-1", "true", "null", "ünï 数", "a/b", "a\nb", "\x00", "~", "kv", "[kv]", "{}"),
    *([], [None], [[]], ["x"], [1, 2], [-1], {}, {"x": 1}, {"": {}}, {"x": {"y": []}}),
)


def places(tree: Any, at: tuple = ()) -> list[tuple]:
    """The path of keys and indices to every value in a tree, except the tree itself."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*at, key), *places(value, (*at, key)))]


def _container(tree: Any, place: tuple) -> Any:
    for key in place[:-1]:
        tree = tree[key]
    return tree


@st.composite
def damaged_trees(draw: Callable, tree: Any, most: int = 3) -> Any:
    """A copy of a tree with one to a few values replaced, removed, renamed, wrapped, repeated or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        found = places(tree)
        if not found:
            break
        place = draw(st.sampled_from(found))
        inside, key = _container(tree, place), place[-1]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "rename", "wrap", "repeat", "exchange")))
        if kind == "replace":
            inside[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif kind == "wrap":
            inside[key] = [inside[key]]
        elif kind == "exchange":
            other = draw(st.sampled_from(found))
            inside[key] = copy.deepcopy(_container(tree, other)[other[-1]])
        elif isinstance(inside, list):
            inside.insert(key, copy.deepcopy(inside[key])) if kind == "repeat" else inside.pop(key)
        elif kind == "rename":
            inside[f"{key}x"] = inside.pop(key)
        else:
            inside.pop(key)
    return tree


@st.composite
def damaged_bytes(draw: Callable, content: bytes, first: int | None = None) -> bytes:
    """Bytes with one to three runs overwritten, removed, inserted or cut off, among the `first` bytes."""
    for _ in range(draw(st.integers(1, 3))):
        end = min(len(content), first or len(content))
        start = draw(st.integers(0, max(end - 1, 0)))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(("overwrite", "remove", "insert", "cut")))
        if kind == "cut":
            content = content[:start]
            continue
        new = b"" if kind == "remove" else draw(st.binary(min_size=length, max_size=length))
        content = content[:start] + new + content[start if kind == "insert" else start + length :]
    return content


def damaged_json(tree: Any, most: int = 3) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file whose values, or whose characters, are damaged."""
    values = damaged_trees(tree, most).map(lambda damaged: json.dumps(damaged).encode())
    return st.one_of(values, values, values, damaged_bytes(json.dumps(tree).encode()))
