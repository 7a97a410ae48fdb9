"""The tests of reports draw the pictures."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def pictures() -> None:
    """Draw pictures, as for a user."""
