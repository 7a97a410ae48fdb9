"""Environment and order of all tests. What else they share is in helpers/."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest

# Files of half a minute and more. They come first, so that no process is left with one when the others have ended.
LONG = (
    *("test_distributed", "test_run", "test_trainer", "test_encoder_folders", "test_encoders", "test_compare"),
    *("test_eval_command", "test_decoders", "test_hub", "test_slicing", "test_resume", "test_disturbances"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first (the Makefile keeps this order)."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_configure(config: pytest.Config) -> None:
    """Settings and fixtures, but not in the process of pytest-xdist that only hands out tests: torch takes seconds."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("helpers.fixtures")
