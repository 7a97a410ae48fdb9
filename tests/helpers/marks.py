"""Tests that the ordinary suite runs in part and the slow suite runs whole."""

from collections.abc import Callable, Iterable

import pytest


def slow(*values):
    """Parameters of a test. All but the first are for the slow suite only."""
    return ordinary_if(lambda value: value == values[0], [(value,) for value in values])


def ordinary_if(chosen: Callable[..., object], values: Iterable[tuple]):
    """Parameters of a test. Those that are not chosen are for the slow suite only."""
    return [pytest.param(*each, marks=() if chosen(*each) else pytest.mark.slow) for each in values]
