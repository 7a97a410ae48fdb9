"""States of a model that hold for a while: evaluation mode, other `forward`s. All is put back, even after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode for a while; then every module has the mode again that it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def restoring(modules: Iterable[nn.Module], *names: str) -> Iterator[None]:
    """Put back what modules themselves had under some names (not their classes), whatever the block does to it.

    accelerate, too, puts a `forward` on a module that hides its class's.

    Args:
        modules: the modules.
        names: of attributes, default `forward`.
    """
    names = names or ("forward",)
    before = [(m, {name: m.__dict__[name] for name in names if name in m.__dict__}) for m in modules]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)
