"""What the ordinary suite runs of a test that the slow suite runs whole."""

from collections.abc import Callable, Iterable

import pytest


def slow(*values):
    """Parameters of a test, all but the first for the slow suite only."""
    return ordinary_if(lambda value: value == values[0], [(value,) for value in values])


def ordinary_if(chosen: Callable[..., object], values: Iterable[tuple]):
    """Parameters of a test, those that are not chosen for the slow suite only."""
    return [pytest.param(*each, marks=() if chosen(*each) else pytest.mark.slow) for each in values]
