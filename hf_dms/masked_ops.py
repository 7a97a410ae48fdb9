"""The operations in which a mask enters a forward pass, as autograd functions that save little memory for the backward.

Each takes the logarithm of a mask (gates.py): its gradient is the Taylor term m·dL/dm. Autograd would save x for the
product y = x·m, and the next matrix product saves y as well. These functions need only y, so masking costs no memory of
the size of a batch.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Masks below this are set to 0. Beside 1, float32 resolves only 2^-24, so the output does not change. Without the
# threshold, activations, gradients and their squares in Adam would become denormal numbers, on which a CPU is many
# times slower.
SMALLEST_MASK = 2.0**-40


def mask_of(log_mask: Tensor) -> Tensor:
    """m = exp(log m), 0 below `SMALLEST_MASK`."""
    return F.threshold(log_mask.exp(), SMALLEST_MASK, 0.0)


class Span(NamedTuple):
    """Where the units of a dim are on an axis.

    The axis may be a product of dims, such as (kv rep d) for the inputs of an attention's output map: the span of `kv`
    is then (1, kv, rep·d). Every unit has a whole block, or one in each of the blocks of the dims before it. On an axis
    of several products one after the other, (a + b), the span of `b` starts behind `a`.

    Attributes:
        before: positions of the dims in front of this one in its product.
        units: units of the dim.
        after: positions of the dims behind it in its product.
        start: positions of the axis in front of the product.
        rest: positions of the axis behind the product.
    """

    before: int
    units: int
    after: int
    start: int = 0
    rest: int = 0


def spread(values: Tensor, span: Span, other: float) -> Tensor:
    """A value for each position of an axis, from values of the units of a dim; `other` where the dim is not.

    Examples:
        >>> spread(torch.tensor([3.0, 4.0]), Span(1, 2, 2, start=1), other=1.0)
        tensor([1., 3., 3., 4., 4.])
    """
    own = values if span.before * span.after == 1 else values[None, :, None].expand(span[:3]).reshape(-1)
    return F.pad(own, (span.start, span.rest), value=other) if span.start or span.rest else own


def of_units(values: Tensor, span: Span) -> Tensor:
    """The values that belong to the units of a dim, `[before, units, after]`, from a value for each position.

    Examples:
        >>> of_units(torch.tensor([1.0, 3.0, 3.0, 4.0, 4.0]), Span(1, 2, 2, start=1))
        tensor([[[3., 3.],
                 [4., 4.]]])
    """
    return values[span.start : len(values) - span.rest].view(span[:3])


class MaskUnits(torch.autograd.Function):
    """y = x·m along one axis, by default the last, m = exp(log m) at the positions of a span.

    Saved for the backward: y alone. dL/d(log m) = m·dL/dm = Σ g·y needs neither x nor a division.
    """

    @staticmethod
    def forward(ctx, x: Tensor, log_mask: Tensor, span: Span, axis: int = -1) -> Tensor:
        behind = (1,) * (x.dim() - 1 - axis % x.dim())  # so that the mask broadcasts over the axes after its own
        mask = spread(mask_of(log_mask).to(x.dtype), span, other=1.0).view(-1, *behind)
        y = x * mask
        ctx.save_for_backward(y, mask)
        ctx.span, ctx.axis = span, axis
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, mask = ctx.saved_tensors
        grad_x = grad * mask if ctx.needs_input_grad[0] else None
        grad_log_mask = None
        if ctx.needs_input_grad[1]:
            # Sum over batch and positions first, in float32 at least: millions of terms would drown in half precision.
            others = [axis for axis in range(y.dim()) if axis != ctx.axis % y.dim()]
            per_column = (grad * y).sum(others, dtype=_at_least_float32(y.dtype))
            grad_log_mask = of_units(per_column, ctx.span).sum((0, 2)).to(torch.float32)
        return grad_x, grad_log_mask, None, None


class MaskKernel(torch.autograd.Function):
    """The weights of a linear map or a convolution times the mask of its inputs: (x·m) Wᵀ = x (W·m)ᵀ.

    It equals masking the inputs (`MaskUnits`), and dL/d(log m) = Σ g·W·m is the same number. It is cheaper where the
    weights are fewer numbers than the inputs of a batch, as in convolutions on large images (`FEWER` in attach.py).

    Saved for the backward: W·m, which the map saves too.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, log_mask: Tensor, span: Span) -> Tensor:
        mask = spread(mask_of(log_mask).to(weight.dtype), span, other=1.0).view(-1, *(1,) * (weight.dim() - 2))
        masked = weight * mask
        ctx.save_for_backward(masked, mask)
        ctx.span = span
        return masked

    @staticmethod
    def backward(ctx, grad: Tensor):
        masked, mask = ctx.saved_tensors
        grad_log_mask = None
        if ctx.needs_input_grad[1]:
            per_input = (grad * masked).sum((0, *range(2, grad.dim())), dtype=_at_least_float32(grad.dtype))
            grad_log_mask = of_units(per_input, ctx.span).sum((0, 2)).to(torch.float32)
        return grad * mask if ctx.needs_input_grad[0] else None, grad_log_mask, None


class GateResidual(torch.autograd.Function):
    """x + m·(y - x), exactly x at m = 0 and y at m = 1; dL/d(log m) = Σ g·(out - x).

    x is a layer's input and y its output: with y = x + f(x) this is the paper's x + m·f(x). It is written with y
    because f alone is not visible from outside a layer.

    Saved for the backward: x and the output. The norms before and after the layer save both anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, log_mask: Tensor) -> Tensor:
        mask = mask_of(log_mask).to(x.dtype)
        out = torch.lerp(x, y, mask)  # exact at both ends, which x + m·(y - x) in floating point is not
        ctx.save_for_backward(x, out, mask)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, out, mask = ctx.saved_tensors
        room, grad_log_mask = torch.empty_like(grad), None  # one tensor for two results: a step waits for memory
        if ctx.needs_input_grad[2]:
            grad_log_mask = _dot(grad, torch.sub(out, x, out=room))
        grad_y = torch.mul(grad, mask, out=room)
        return grad - grad_y, grad_y, grad_log_mask


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # the meta device has none
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class MaskedNorm(torch.autograd.Function):
    """RMS norm or layer norm with statistics over the kept units only; its output is masked after the bias.

    With M = Σ m, μ = Σ m·x / M (0 for an RMS norm), v = Σ m·(x - μ)² / M and r = (v + ε)^(-1/2):
    y = m·(w·(x - μ)·r + b). At m = 1 it is the stock norm, at a hard mask the norm of the cut model. Like the stock RMS
    norm it computes in float32 at least, and rounds to the input's dtype before it applies the weight.

    Saved for the backward: x, which the stock norm saves too, and two numbers per position, μ and r. Everything else is
    computed again in the backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, log_mask: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool):
        wide = _at_least_float32(x.dtype)
        mask = mask_of(log_mask).to(wide)
        share = mask / mask.sum()
        offset, centre = x.to(wide), None
        with _without_autocast(x.device.type):  # autocast would compute the sums of squares in half precision
            if centered:
                centre = (offset @ share)[..., None]
                offset = offset - centre
            y = offset.square()
            inverse = torch.rsqrt(
                (y @ share)[..., None] + eps
            )  # r; a matrix product is faster than (y * share).sum(-1)
        ctx.save_for_backward(x, log_mask, weight, bias, centre, inverse)
        ctx.eps = eps
        normed = offset.mul_(inverse) if centered else offset * inverse  # without a centre, `offset` is x itself
        if x.dtype != wide:
            y = weight * normed.mul_(mask).to(x.dtype)
            return y if bias is None else y + bias * mask.to(x.dtype)
        torch.mul(normed, weight * mask, out=y)  # the squares are no longer needed: their memory takes the output
        return y if bias is None else y.add_(bias * mask)

    @staticmethod
    @once_differentiable  # it reuses memory in place, through which no second derivative could pass
    def backward(ctx, grad: Tensor):
        # Names: x̂ = (x - μ)·r, g the gradient of y. The chain rule has three paths from y to x and m: through x - μ
        # directly, through the variance v (in r), and through the mean μ. All sums over positions become matrix
        # products with `[positions, hidden]` tensors, and two such tensors are reused for every product.
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
        room = offset * scaled  # g·x̂; its memory is reused below
        columns = room.sum(0)  # Σ g·x̂ per unit, [hidden]
        dot = room @ (weight * mask)  # Σ g·w·m·x̂ per position
        of_bias = g.sum(0)
        # dL/dv = -½·r³·Σ g·w·m·(x - μ) = -½·r²·dot, and dL/dμ = -r·Σ g·w·m, as Σ m·(x - μ) = 0.
        grad_variance = -0.5 * inverse.squeeze(-1).square() * dot
        grad_centre = -(scaled @ (weight * mask)) if centre is not None else None
        grad_x = grad_log_mask = grad_weight = grad_bias = None
        torch.mul(offset, grad_variance[:, None], out=room)  # dL/dv·(x - μ)
        if ctx.needs_input_grad[0]:
            # Direct: g·w·m·r. Through the variance: dv/dx = 2·m·(x - μ)/M. Through the mean: dμ/dx = m/M.
            grad_x = scaled.mul_(weight * mask).addcmul_(room, 2 * mask / total)
            if grad_centre is not None:
                grad_x.addr_(grad_centre, mask / total)
            grad_x = grad_x.to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            # Direct: Σ g·(w·x̂ + b). Through the variance: dv/dm = ((x - μ)² - v)/M. Through the mean: dμ/dm = (x -
            # μ)/M.
            variance = inverse.squeeze(-1).pow(-2)  # v + ε, and ε is subtracted below
            squares = room.mul_(offset).sum(0)  # Σ dL/dv·(x - μ)²
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
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808) with its mean over the kept units.

    With g the norm of each unit over the image: y = w·x·g / (Σ m·g / Σ m + ε) + b + x. The output is not masked here:
    the map that reads y masks its inputs.

    Args:
        x: `[batch, height, width, units]`.
        log_mask: `[units]`.
        weight, bias: `[1, 1, 1, units]`.
        eps: 1e-6, the constant in the code of transformers' class.

    Returns:
        y, of the shape of x.
    """
    mask = mask_of(log_mask).to(_at_least_float32(x.dtype))
    response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    mean = (response * (mask / mask.sum())).sum(-1, keepdim=True)
    return weight * (x * (response / (mean + eps)).to(x.dtype)) + bias + x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b, a float32 scalar. Where strides and dtype allow it, no tensor of products is allocated."""
    wide = a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    if wide and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.flatten(), b.flatten()).to(torch.float32)
    return (a * b).sum(dtype=_at_least_float32(a.dtype)).to(torch.float32)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
