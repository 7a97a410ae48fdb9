"""Reports are tested with their pictures."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def pictures() -> None:
    """Drawn, as for a user."""
