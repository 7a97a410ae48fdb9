"""Values of a recipe converted to the types that a section's dataclass names, with errors in YAML's words."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from typing import Any

from ..errors import HfDmsError, did_you_mean

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a section with keys",
    list: "a list",
    tuple: "a list",
}


def coerce_fields(cls: type, given: dict[str, Any], section: str) -> dict[str, Any]:
    """The values of a section, converted to the types in its dataclass.

    Conversion is needed because PyYAML reads `1e-4` as a string. A null value counts as left out, unless the field's
    type allows None.

    Raises:
        ValueError: the dataclass has no such key, or the value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    check_keys(given, [field.name for field in dataclasses.fields(cls) if field.init], f"{section}.")
    values = {key: _coerce(value, hints[key], f"{section}.{key}") for key, value in given.items()}
    return {key: value for key, value in values.items() if value is not None or _may_be_none(hints[key])}


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    kinds = [kind for kind in kinds if isinstance(kind, type) and kind is not Any]  # what Any holds is checked later
    if value is None or not kinds or (isinstance(value, bool) and bool in kinds):
        return value
    if value is False and any(issubclass(kind, Enum) and "no" in [each.value for each in kind] for kind in kinds):
        return "no"  # YAML reads `save_strategy: no` as false
    if any(isinstance(value, kind) for kind in kinds) and not isinstance(value, bool):
        if typing.get_origin(hint) is list and isinstance(value, list):
            (kind,) = typing.get_args(hint)
            if None in value:  # elsewhere a null counts as left out
                raise HfDmsError(f"each of {name} must be {WORDS[kind]}, got None.")
            return [_coerce(each, kind, f"each of {name}") for each in value]
        return value
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if int in kinds and isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and any(issubclass(kind, str) for kind in kinds):
        return value
    if not any(kind in WORDS for kind in kinds):
        return value  # an enum or a class that TrainingArguments checks itself
    expected = " or ".join(dict.fromkeys(WORDS[kind] for kind in kinds if kind in WORDS))
    advice = f" Write [{value}]." if {list, tuple} & set(kinds) and isinstance(value, str) else ""
    raise HfDmsError(f"{name} must be {expected}, got {value!r}.{advice}")


def check_keys(given: dict[str, Any], known: list[str], prefix: str) -> None:
    """Check the keys of a section, whose name is the prefix, with a dot.

    Raises:
        ValueError: an unknown key.
    """
    for key in given:
        if key not in known:
            hint = did_you_mean(str(key), known, prefix) or f" Known keys: {', '.join(sorted(known))}."
            raise HfDmsError(f"Unknown key {prefix}{key}.{hint}")
