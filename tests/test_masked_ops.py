"""Masked operations, forward and backward, against autograd on the plain formulas."""

import pytest
import torch
from torch import nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_dms.masked_ops import (
    GateResidual,
    MaskedNorm,
    MaskKernel,
    MaskUnits,
    Span,
    masked_response_norm,
    of_units,
    spread,
)


def double(*shape, seed=0, low=None):
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (values if low is None else low + values.abs()).requires_grad_()


def log_mask(*shape, seed=0):
    """Logarithms of masks between 0.1 and 0.95."""
    uniform = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (0.1 + 0.85 * uniform).log().requires_grad_()


# The gradient of a mask is rounded to float32 (2^-24); the others are exact in float64.
TO_FLOAT32 = dict(rtol=1e-6, atol=1e-6)
EXACTLY = dict(rtol=1e-10, atol=1e-10)


def assert_same_gradients(function, formula, inputs, mask_at):
    """Assert that outputs and gradients of a custom function equal those of autograd for the plain formula."""
    found, expected = function(*inputs), formula(*inputs)
    torch.testing.assert_close(found, expected, **EXACTLY)
    upstream = double(*expected.shape, seed=9).detach()
    ours, theirs = torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    for place, (our, their) in enumerate(zip(ours, theirs)):
        torch.testing.assert_close(our, their, **(TO_FLOAT32 if place == mask_at else EXACTLY))


def test_mask_units_is_the_product_and_its_gradient_that_of_autograd():
    def formula(x, log_mask):
        return x * log_mask.exp()[None, :, None].expand(2, 3, 4).reshape(-1)

    inputs = double(5, 7, 24), log_mask(3)
    assert_same_gradients(lambda x, m: MaskUnits.apply(x, m, Span(2, 3, 4)), formula, inputs, mask_at=1)
    assert torch.autograd.gradcheck(lambda x, m: MaskUnits.apply(x, m, Span(2, 3, 4)), (double(2, 24), log_mask(3)))


def test_mask_units_is_the_product_along_a_convolutions_axis_too():
    def formula(x, log_mask):
        return x * log_mask.exp()[None, :, None].expand(2, 3, 1).reshape(-1, 1, 1)

    inputs = double(5, 6, 4, 3), log_mask(3)
    assert_same_gradients(lambda x, m: MaskUnits.apply(x, m, Span(2, 3, 1), 1), formula, inputs, mask_at=1)


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(1, 2, 1), [3.0, 4.0]),
        (Span(1, 2, 2), [3.0, 3.0, 4.0, 4.0]),
        (Span(2, 2, 1), [3.0, 4.0, 3.0, 4.0]),
        (Span(1, 2, 1, start=1, rest=2), [7.0, 3.0, 4.0, 7.0, 7.0]),
        (Span(2, 2, 2, start=0, rest=1), [3.0, 3.0, 4.0, 4.0, 3.0, 3.0, 4.0, 4.0, 7.0]),
    ],
)
def test_values_of_units_are_spread_over_a_span_and_found_there_again(span, expected):
    values = torch.tensor([3.0, 4.0])
    found = spread(values, span, other=7.0)
    assert found.tolist() == expected
    assert torch.equal(of_units(found, span), values[None, :, None].expand(span.before, 2, span.after))


def test_a_mask_on_a_part_of_an_axis_leaves_the_rest():
    def formula(x, log_mask):
        return torch.cat((x[:, :2], x[:, 2:8] * log_mask.exp().repeat_interleave(2), x[:, 8:]), 1)

    span = Span(1, 3, 2, start=2, rest=1)
    assert_same_gradients(lambda x, m: MaskUnits.apply(x, m, span), formula, [double(4, 9), log_mask(3)], mask_at=1)


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, 3, 2), (2, 3, 1)])
def test_a_masked_kernel_gives_what_masked_inputs_give_and_its_gradient(shape):
    before, units, after = shape

    def kernel(weight, log_mask):
        return MaskKernel.apply(weight, log_mask, Span(*shape))

    def convolved(x, weight, log_mask):
        return nn.functional.conv2d(x, kernel(weight, log_mask), padding=1, stride=2)

    def over_inputs(log_mask):
        return log_mask.exp().repeat_interleave(after).repeat(before)[:, None, None]

    def formula(x, weight, log_mask):
        return nn.functional.conv2d(x * over_inputs(log_mask), weight, padding=1, stride=2)

    width = before * units * after
    inputs = double(5, width, 6, 4), double(2, width, 3, 3, seed=1), log_mask(units)
    assert_same_gradients(convolved, formula, inputs, mask_at=2)
    assert_same_gradients(kernel, lambda w, m: w * over_inputs(m), inputs[1:], mask_at=1)
    assert kernel(*inputs[1:]).shape == (2, width, 3, 3)


def test_a_residual_of_other_strides_has_the_gradient_of_one_without():
    x, y, mask = double(2, 3, 4, 5), double(2, 3, 4, 5, seed=1), log_mask(1)[0].detach().requires_grad_()
    upstream = double(2, 3, 4, 5, seed=2).detach()
    expected = torch.autograd.grad(GateResidual.apply(x, y, mask), mask, upstream)
    last = [tensor.detach().to(memory_format=torch.channels_last) for tensor in (x, y, upstream)]
    found = torch.autograd.grad(GateResidual.apply(*last[:2], mask), mask, last[2])
    torch.testing.assert_close(found, expected, **TO_FLOAT32)


def test_a_large_residual_is_summed_as_exactly_as_float32_can():
    x, y, upstream = (double(2**21, seed=seed).detach() for seed in range(3))
    grads = []
    for dtype in (torch.float32, torch.float64):
        mask = torch.tensor(-0.5, requires_grad=True)
        out = GateResidual.apply(x.to(dtype), y.to(dtype), mask)
        grads += torch.autograd.grad(out, mask, upstream.to(dtype))
    scale = float((upstream * (y - x)).abs().sum())
    assert abs(float(grads[0] - grads[1])) < 1e-6 * scale


def test_a_masked_response_norm_is_that_of_the_units_that_are_kept():
    norm = ConvNextV2GRN(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, kept = double(2, 3, 4, 6), torch.tensor([0, 2, 3])
    mask = torch.zeros(6, dtype=torch.float64).index_fill(0, kept, 1.0)
    smaller = ConvNextV2GRN(3).double()
    smaller.weight.data, smaller.bias.data = norm.weight.data[..., kept], norm.bias.data[..., kept]
    found = masked_response_norm(x, mask.log(), norm.weight, norm.bias)
    torch.testing.assert_close(found[..., kept], smaller(x[..., kept]), **EXACTLY)
    whole = masked_response_norm(x, torch.zeros(6, dtype=torch.float64), norm.weight, norm.bias)
    torch.testing.assert_close(whole, norm(x), **EXACTLY)


def test_gate_residual_is_x_plus_m_times_f_and_its_gradient_that_of_autograd():
    inputs = double(5, 7, 4), double(5, 7, 4, seed=1), log_mask(1)[0]
    assert_same_gradients(GateResidual.apply, lambda x, y, m: x + m.exp() * (y - x), inputs, mask_at=2)
    assert torch.autograd.gradcheck(GateResidual.apply, inputs)


def test_gate_residual_is_exact_at_both_ends():
    x, y = torch.randn(3, 4), torch.randn(3, 4) * 1e8
    assert torch.equal(GateResidual.apply(x, y, torch.tensor(-torch.inf)), x)
    assert torch.equal(GateResidual.apply(x, y, torch.tensor(0.0)), y)


def masked_norm_formula(x, log_mask, weight, bias, eps, centered):
    mask = log_mask.exp()
    centre = (mask * x).sum(-1, keepdim=True) / mask.sum() if centered else 0
    variance = (mask * (x - centre) ** 2).sum(-1, keepdim=True) / mask.sum()
    y = mask * weight * (x - centre) / torch.sqrt(variance + eps)
    return y if bias is None else y + mask * bias


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_masked_norm_is_the_formula_and_its_gradient_that_of_autograd(centered, with_bias, eps):
    inputs = [double(5, 7, 6), log_mask(6), double(6, seed=2)] + [double(6, seed=3)] * with_bias

    def run(function):
        return lambda x, m, w, b=None: function(x, m, w, b, eps, centered)

    assert_same_gradients(run(MaskedNorm.apply), run(masked_norm_formula), inputs, mask_at=1)
    assert torch.autograd.gradcheck(run(MaskedNorm.apply), inputs)


@pytest.mark.parametrize("centered", [False, True])
def test_masked_norm_at_a_hard_mask_is_the_norm_of_the_kept_units(centered):
    x, weight, bias = double(5, 6), double(6, seed=1), double(6, seed=2)
    kept = torch.tensor([0, 2, 3, 5])
    hard = torch.full((6,), -torch.inf).index_fill(0, kept, 0.0)
    found = MaskedNorm.apply(x, hard, weight, bias, 1e-5, centered)
    small = x[:, kept]
    if centered:
        expected = nn.functional.layer_norm(small, (4,), weight[kept], bias[kept], 1e-5)
    else:
        expected = nn.functional.rms_norm(small, (4,), weight[kept], 1e-5) + bias[kept]
    torch.testing.assert_close(found[:, kept], expected, **EXACTLY)
    assert found[:, [1, 4]].abs().max() == 0
    assert torch.isfinite(torch.autograd.grad(found.sum(), x)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_open_masked_norm_is_the_stock_norm(dtype):
    norm = LlamaRMSNorm(64, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 64).to(dtype)
    found = MaskedNorm.apply(x, torch.zeros(64), norm.weight, None, 1e-6, False)
    # one unit in the last place: Σ x²/N is summed in another order
    torch.testing.assert_close(found, norm(x), rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    assert found.dtype == dtype


CALLS = {  # function: its differentiable inputs, the others
    MaskUnits: (lambda: [double(3, 4), log_mask(4)], [Span(1, 4, 1)]),
    MaskKernel: (lambda: [double(3, 4, 2, 1), log_mask(4)], [Span(1, 4, 1)]),
    GateResidual: (lambda: [double(3, 4), double(3, 4, seed=1), log_mask(1)[0].detach()], []),
    MaskedNorm: (lambda: [double(3, 4), log_mask(4), double(4, seed=1), double(4, seed=2)], [0.1, True]),
}


@pytest.mark.parametrize(("function", "place"), [(f, p) for f, (make, _) in CALLS.items() for p in range(len(make()))])
def test_one_input_alone_gets_the_gradient_that_it_gets_with_all_others(function, place):
    make, options = CALLS[function]
    with_all = [tensor.detach().requires_grad_() for tensor in make()]
    alone = [tensor.detach().requires_grad_(i == place) for i, tensor in enumerate(make())]
    function.apply(*with_all, *options).square().sum().backward()
    function.apply(*alone, *options).square().sum().backward()
    torch.testing.assert_close(alone[place].grad, with_all[place].grad, **EXACTLY)


@pytest.mark.parametrize("function", [MaskUnits, MaskKernel, MaskedNorm])
def test_inputs_without_gradient_cost_none(function):
    make, options = CALLS[function]
    for place in range(len(make())):
        inputs = [tensor.detach().requires_grad_(i == place) for i, tensor in enumerate(make())]
        out = function.apply(*inputs, *options)
        found = out.grad_fn.apply(torch.ones_like(out))
        assert [i for i, gradient in enumerate(found) if gradient is not None] == [place]


def test_a_mask_that_needs_no_gradient_of_a_layer_costs_none():
    out = GateResidual.apply(double(3, 4), double(3, 4, seed=1), log_mask(1)[0].detach())
    assert out.grad_fn.apply(torch.ones_like(out))[2] is None


def test_half_precision_is_summed_in_float32():
    """A sum that is rounded to bfloat16 has a relative error of up to 2^-9."""
    x = (1 + double(2000, 3).detach().abs()).bfloat16().requires_grad_()
    others = [torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)]
    outs = [MaskUnits.apply(x, others[0], Span(1, 3, 1)), GateResidual.apply(torch.zeros_like(x), x, others[1])]
    for mask, out, axes in zip(others, outs, ((0,), (0, 1))):
        out.sum().backward()
        torch.testing.assert_close(mask.grad, x.detach().float().sum(axes), rtol=1e-5, atol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_a_masked_norm_of_half_precision_takes_its_statistics_in_float32(centered):
    x = (100 + double(5, 64).detach()).bfloat16()
    mask, weight = log_mask(64).detach().float(), torch.ones(64, dtype=torch.bfloat16)
    found = MaskedNorm.apply(x, mask, weight, None, 1e-6, centered)
    expected = MaskedNorm.apply(x.double(), mask.double(), weight.double(), None, 1e-6, centered)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_masks_that_cannot_matter_are_zero_so_that_nothing_becomes_denormal():
    log_mask = torch.linspace(-120.0, 0.0, 1000)
    x, weight = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)), torch.ones(1000)
    y = MaskUnits.apply(x, log_mask, Span(1, 1000, 1))
    normed = MaskedNorm.apply(x, log_mask, weight, weight, 1e-6, True)
    kernel = MaskKernel.apply(x.view(6, 1000, 1, 1), log_mask, Span(1, 1000, 1))
    for found in (y, normed, kernel, y.square(), GateResidual.apply(torch.zeros(()), torch.ones(()), log_mask[250])):
        assert not ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()
    kept = log_mask > -27.7  # 2^-40
    assert torch.equal(y != 0, kept.expand(6, -1))
    assert torch.equal(y[:, kept], x[:, kept] * log_mask[kept].exp())
