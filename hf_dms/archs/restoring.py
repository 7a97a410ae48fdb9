"""Temporary states of a model: evaluation mode, replaced `forward`s, a higher precision.

Each is a context manager that restores the former state at the end, also after an error.
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
    """Context: models are in evaluation mode. Afterwards every module has its former mode."""
    # `train()` afterwards would also set modules that were in evaluation mode before, such as frozen batch norms.
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
    """Context: restore attributes of module instances at the end, whatever the block changes.

    It restores only attributes of the instances, not of their classes. An instance can have its own `forward` already:
    accelerate sets one too.

    Args:
        modules: the modules.
        names: names of the attributes. Default: `forward`.
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
    """Context: a model computes in float32 or float64, with the values of its parameters of lower precision.

    Each layer of a stack is upcast when it runs and restored afterwards. Everything else is upcast the whole time. So
    it takes memory for the embeddings, the head and one layer, not for a second model. The parameters themselves stay
    the same objects. Products of float32 matrices are not rounded to TF32.
    """
    layers = list(_stacked_layers(model))
    stacked = {module for layer in layers for module in layer.modules()}
    with contextlib.ExitStack() as stack, _exact_products():
        stack.enter_context(_upcast((module for module in model.modules() if module not in stacked), dtype))
        for layer in layers:
            whole = contextlib.ExitStack()
            stack.callback(whole.close)  # restores a layer that raised an error
            before = layer.register_forward_pre_hook(functools.partial(_enter, whole, dtype), prepend=True)
            after = layer.register_forward_hook(functools.partial(_leave, whole))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _stacked_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in the outermost lists of modules."""
    for child in module.children():
        # Not into lists inside a layer: their modules are upcast with the layer.
        yield from child.children() if isinstance(child, nn.ModuleList) else _stacked_layers(child)


def _enter(whole: contextlib.ExitStack, dtype: torch.dtype, layer: nn.Module, args: tuple) -> None:
    whole.enter_context(_upcast(layer.modules(), dtype))


def _leave(whole: contextlib.ExitStack, layer: nn.Module, args: tuple, output: object) -> None:
    whole.close()


@contextlib.contextmanager
def _upcast(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Context: parameters and buffers of lower precision are replaced by upcast copies."""
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
