"""States of a model that hold for a while: evaluation mode, other `forward`s, a higher precision.

Everything is put back in the end, even after an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


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


# ---- precision -------------------------------------------------------------------------------------------------------
HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run a model in float32 or float64 for a while, with the values that its parameters of lower precision have.

    Each layer of a stack is upcast when it runs and put back after it, everything else for the whole time. So the room
    that it takes is that of the embeddings, the head and one layer, not that of a second model. Parameters stay the
    objects that they are. Products of float32 matrices are not rounded to TF32 meanwhile.
    """
    layers = list(_stacked_layers(model))
    stacked = {module for layer in layers for module in layer.modules()}
    with contextlib.ExitStack() as stack, _exact_products():
        stack.enter_context(_upcast((module for module in model.modules() if module not in stacked), dtype))
        for layer in layers:
            whole = contextlib.ExitStack()
            stack.callback(whole.close)  # if the layer fails
            before = layer.register_forward_pre_hook(functools.partial(_enter, whole, dtype), prepend=True)
            after = layer.register_forward_hook(functools.partial(_leave, whole))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _stacked_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in the outermost lists of modules."""
    for child in module.children():
        yield from child.children() if isinstance(child, nn.ModuleList) else _stacked_layers(child)


def _enter(whole: contextlib.ExitStack, dtype: torch.dtype, layer: nn.Module, args: tuple) -> None:
    whole.enter_context(_upcast(layer.modules(), dtype))


def _leave(whole: contextlib.ExitStack, layer: nn.Module, args: tuple, output: object) -> None:
    whole.close()


@contextlib.contextmanager
def _upcast(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Give modules copies of their parameters and buffers of lower precision for a while."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules:
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for own in tables:
            for name, tensor in own.items():
                if tensor is not None and tensor.is_floating_point() and tensor.itemsize < dtype.itemsize:
                    before.append((own, name, tensor))
                    whole = tensor.detach().to(dtype)
                    own[name] = nn.Parameter(whole, False) if isinstance(tensor, nn.Parameter) else whole
    try:
        yield
    finally:
        for own, name, tensor in before:
            own[name] = tensor


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
