"""Settings and fixtures of all tests. Shared functions are in the other files here."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from helpers.killing import without_picture
from helpers.recipes import dense, recipe  # noqa: F401
from helpers.runs import whole  # noqa: F401
from hypothesis import HealthCheck, settings
from torch import Tensor

from hf_dms.report.page import TEMPLATES

torch.set_num_threads(1)
settings.register_profile(
    "hf_dms",
    max_examples=30,
    deadline=None,  # no test fails for being slow
    derandomize=True,  # the same inputs in every run, so a test that fails fails again
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixtures that it is used with hold no state
)
settings.register_profile("many", settings.get_profile("hf_dms"), max_examples=400)  # used by `make test-slow`
settings.load_profile("hf_dms")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """Exclude imported objects from later garbage collections. Each training runs one."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # with the default of 700, collections take two percent of the time


@pytest.fixture(autouse=True, scope="session")
def paths_of_processes() -> Iterator[None]:
    """Processes that tests start find this checkout, its helpers, and startup/sitecustomize.py."""
    # Not when this file is imported: the workers of pytest-xdist would be such processes too.
    with pytest.MonkeyPatch.context() as patch:
        tests = Path(__file__).parents[1]
        paths = (tests / "helpers" / "startup", tests.parent, tests)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        yield


@pytest.fixture(autouse=True, scope="module")
def pictures() -> Iterator[None]:
    """Draw no pictures in the pages of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEMPLATES.globals, "svg", without_picture)
        yield


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stock RMS norms compute in their input's dtype, so that float64 models are float64 throughout."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(MistralRMSNorm, "forward", forward)
