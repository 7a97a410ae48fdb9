"""The places where a mask enters a forward pass, as autograd functions that keep no more than they must.

Each takes the logarithm of a mask (gates.py), whose gradient is the Taylor term m·dL/dm. A naive product x·m would keep
both x and y = x·m for the backward; y alone is enough, and the next matmul keeps it anyway.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Smaller masks are 0. They are far below what float32 tells apart beside 1, and what they would multiply, gradients and
# their squares in Adam too, would end in denormal numbers, which take a CPU many times as long.
SMALLEST_MASK = 2.0**-40


def mask_of(log_mask: Tensor) -> Tensor:
    """m = exp(log m), 0 below `SMALLEST_MASK`."""
    return F.threshold(log_mask.exp(), SMALLEST_MASK, 0.0)


class MaskUnits(torch.autograd.Function):
    """y = x·m along one axis, by default the last, m = exp(log m).

    Saved for the backward: y alone. dL/d(log m) = m·dL/dm = Σ g·y needs neither x nor a division.
    """

    @staticmethod
    def forward(ctx, x: Tensor, log_mask: Tensor, shape: tuple[int, int, int], axis: int = -1) -> Tensor:
        behind = (1,) * (x.dim() - 1 - axis % x.dim())
        mask = mask_of(log_mask).to(x.dtype)[None, :, None].expand(shape).reshape(-1, *behind)
        y = x * mask
        ctx.save_for_backward(y, mask)
        ctx.shape, ctx.axis = shape, axis
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, mask = ctx.saved_tensors
        grad_x = grad * mask if ctx.needs_input_grad[0] else None
        grad_log_mask = None
        if ctx.needs_input_grad[1]:
            others = [axis for axis in range(y.dim()) if axis != ctx.axis % y.dim()]
            per_column = (grad * y).sum(others, dtype=_at_least_float32(y.dtype))
            grad_log_mask = per_column.view(ctx.shape).sum((0, 2)).to(torch.float32)
        return grad_x, grad_log_mask, None, None


class MaskKernel(torch.autograd.Function):
    """The weights of a linear map or a convolution times the mask of what it reads: (x·m) Wᵀ = x (W·m)ᵀ.

    dL/d(log m) = Σ g·W·m, the same number as `MaskUnits` gives, but nothing as large as a batch passes for it.

    Saved for the backward: W·m, which the map keeps too.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, log_mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
        mask = mask_of(log_mask).to(weight.dtype)[None, :, None].expand(shape).reshape(-1, *(1,) * (weight.dim() - 2))
        masked = weight * mask
        ctx.save_for_backward(masked, mask)
        ctx.shape = shape
        return masked

    @staticmethod
    def backward(ctx, grad: Tensor):
        masked, mask = ctx.saved_tensors
        grad_log_mask = None
        if ctx.needs_input_grad[1]:
            per_input = (grad * masked).sum((0, *range(2, grad.dim())), dtype=_at_least_float32(grad.dtype))
            grad_log_mask = per_input.view(ctx.shape).sum((0, 2)).to(torch.float32)
        return grad * mask if ctx.needs_input_grad[0] else None, grad_log_mask, None


class GateResidual(torch.autograd.Function):
    """x + m·(y - x), exactly x at m = 0 and y at m = 1; dL/d(log m) = Σ g·(out - x).

    Saved for the backward: x and the output, both of which the neighbouring norms keep anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, log_mask: Tensor) -> Tensor:
        mask = mask_of(log_mask).to(x.dtype)
        out = torch.lerp(x, y, mask)
        ctx.save_for_backward(x, out, mask)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, out, mask = ctx.saved_tensors
        grad_y = grad * mask
        grad_log_mask = None
        if ctx.needs_input_grad[2]:
            grad_log_mask = _dot(grad, out - x)
        return grad - grad_y, grad_y, grad_log_mask


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # meta
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class MaskedNorm(torch.autograd.Function):
    """RMS norm or layer norm whose statistics run over the kept width, its output masked after the bias.

    With M = Σ m, μ = Σ m·x / M (0 for an RMS norm), v = Σ m·(x - μ)² / M and r = (v + ε)^(-1/2):
    y = m·(w·(x - μ)·r + b). At m = 1 the stock norm; at a hard mask that of the cut model. Like the stock RMS norm it
    computes in float32 at least, and rounds to the input's dtype before the weight.

    Saved for the backward: x, which the stock norm keeps too, and two numbers per position.
    """

    @staticmethod
    def forward(ctx, x: Tensor, log_mask: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool):
        wide = _at_least_float32(x.dtype)
        mask = mask_of(log_mask).to(wide)
        share = mask / mask.sum()
        offset, centre = x.to(wide), None
        with _without_autocast(x.device.type):  # it would take the sums of squares in half precision
            if centered:
                centre = (offset @ share)[..., None]
                offset = offset - centre
            y = offset.square()
            inverse = torch.rsqrt((y @ share)[..., None] + eps)
        ctx.save_for_backward(x, log_mask, weight, bias, centre, inverse)
        ctx.eps = eps
        normed = offset.mul_(inverse) if centered else offset * inverse
        if x.dtype != wide:
            y = weight * normed.mul_(mask).to(x.dtype)
            return y if bias is None else y + bias * mask.to(x.dtype)
        torch.mul(normed, weight * mask, out=y)
        return y if bias is None else y.add_(bias * mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, log_mask, weight, bias, centre, inverse = ctx.saved_tensors
        wide = _at_least_float32(x.dtype)
        mask = mask_of(log_mask).to(wide)
        total = mask.sum()
        g = grad.to(wide).flatten(0, -2)
        inverse = inverse.flatten(0, -2)
        offset = x.to(wide).flatten(0, -2)
        if centre is not None:
            offset = offset - centre.flatten(0, -2)
        scaled = g * inverse
        room = offset * scaled  # g·x̂; the same memory is used again below
        columns = room.sum(0)  # Σ g·x̂ per unit, [hidden]
        dot = room @ (weight * mask)  # Σ g·w·m·x̂ per position
        of_bias = g.sum(0)
        # dL/dv = -½·r³·Σ g·w·m·(x - μ) = -½·r²·dot, and dL/dμ = -r·Σ g·w·m, as Σ m·(x - μ) = 0.
        grad_variance = -0.5 * inverse.squeeze(-1).square() * dot
        grad_centre = -(scaled @ (weight * mask)) if centre is not None else None
        grad_x = grad_log_mask = grad_weight = grad_bias = None
        torch.mul(offset, grad_variance[:, None], out=room)
        if ctx.needs_input_grad[0]:
            grad_x = scaled.mul_(weight * mask).addcmul_(room, 2 * mask / total)
            if grad_centre is not None:
                grad_x.addr_(grad_centre, mask / total)
            grad_x = grad_x.to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            variance = inverse.squeeze(-1).pow(-2)  # v + ε; the ε of dv/dm = ((x - μ)² - v)/M is taken off below
            squares = room.mul_(offset).sum(0)
            grad_mask = weight * columns + (squares - (grad_variance * (variance - ctx.eps)).sum()) / total
            if bias is not None:
                grad_mask = grad_mask + of_bias * bias
            if grad_centre is not None:
                grad_mask = grad_mask + grad_centre @ offset / total
            grad_log_mask = (grad_mask * mask).to(torch.float32)
        if ctx.needs_input_grad[2]:
            grad_weight = (columns * mask).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = (of_bias * mask).to(bias.dtype)
        return grad_x, grad_log_mask, grad_weight, grad_bias, None, None


def masked_response_norm(x: Tensor, log_mask: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808) whose mean runs over the kept units.

    With g the norm of each unit over the image: y = w·x·g / (Σ m·g / Σ m + ε) + b + x. What reads y masks it.

    Args:
        x: `[batch, height, width, units]`.
        log_mask: `[units]`.
        weight, bias: `[1, 1, 1, units]`.
        eps: that of transformers' class, which holds it in its code.
    """
    mask = mask_of(log_mask).to(_at_least_float32(x.dtype))
    response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    mean = (response * (mask / mask.sum())).sum(-1, keepdim=True)
    return weight * (x * (response / (mean + eps)).to(x.dtype)) + bias + x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b, a float32 scalar; without a tensor of products where the layout and the dtype allow it."""
    wide = a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    if wide and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.flatten(), b.flatten()).to(torch.float32)
    return (a * b).sum(dtype=_at_least_float32(a.dtype)).to(torch.float32)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
