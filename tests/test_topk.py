"""The top-k operator: ranks, soft and hard masks, their gradient and their memory."""

import doctest
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dms import topk
from hf_dms.topk import (
    hard_topk_mask,
    linear_topk_count,
    log_soft_topk_mask,
    normalize_importance,
    num_kept,
    ranks,
    soft_topk_mask,
    steepness_of,
    topk_mask,
)

importances = st.lists(st.sampled_from([0.0, -1.0, 1.0, 2.5, 1e-30, 1e30, math.inf]), min_size=1, max_size=40)
# Two-digit decimals, the way a ratio is written; float32 has none of them exactly.
decimals = st.integers(0, 100).map(lambda hundredths: Fraction(hundredths, 100))


def test_docstring_examples():
    result = doctest.testmod(topk)
    assert result.attempted == 3
    assert result.failed == 0


# ---- ranks ----
@given(importances)
def test_ranks_are_a_permutation_in_the_order_of_importance_with_ties_by_index(values):
    found = ranks(torch.tensor(values)).tolist()
    assert [index for index, _ in sorted(enumerate(found), key=lambda pair: pair[1])] == sorted(
        range(len(values)), key=lambda index: (torch.tensor(values[index]).item(), index)
    )


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_batched_equals_per_row(rows, units, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, 4, (2, rows, units), generator=generator).float()
    ratio = torch.rand(2, rows, generator=generator)
    for function in (soft_topk_mask, hard_topk_mask, log_soft_topk_mask):
        batched = function(importance, ratio)
        for i in range(2):
            for j in range(rows):
                torch.testing.assert_close(batched[i, j], function(importance[i, j], ratio[i, j]))
    mask = hard_topk_mask(importance, ratio)
    assert torch.equal(mask[0, 0], hard_topk_mask(importance[0, 0], ratio[0, 0]))
    assert torch.equal(ranks(importance)[1, 0], ranks(importance[1, 0]))


def test_normalized_importance_is_uniform_at_midpoints_whatever_the_distribution():
    importance = torch.randn(5, 64).exp().pow(7)
    found = normalize_importance(importance).sort(-1).values
    assert torch.equal(found, ((torch.arange(64) + 0.5) / 64).expand(5, 64))
    assert normalize_importance(importance.double()).dtype == torch.float64
    assert normalize_importance(importance.bfloat16()).dtype == torch.float32


# ---- hard masks ----
@given(st.integers(1, 300), decimals, st.sampled_from([torch.float32, torch.float64]))
def test_a_hard_mask_has_floor_of_what_is_kept_plus_a_half_and_at_least_one(units, ratio, dtype):
    kept = max(math.floor((1 - ratio) * units + Fraction(1, 2)), 1)
    a = torch.tensor(float(ratio), dtype=dtype)
    assert int(num_kept(a, units)) == kept
    mask = hard_topk_mask(torch.randn(units, generator=torch.Generator().manual_seed(units)), a)
    assert int(mask.sum()) == kept
    assert set(mask.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("ratio", "units", "kept"), [(0.05, 10, 10), (0.15, 10, 9), (0.25, 2, 2), (0.75, 2, 1), (0.5, 1, 1)]
)
def test_a_half_rounds_up_in_float32_as_on_paper(ratio, units, kept):
    assert int(num_kept(torch.tensor(ratio), units)) == kept


def test_a_ratio_two_floats_above_a_half_is_above_it():
    half = torch.tensor(0.5005)  # of 1000 units: 499.5 stay, and a half rounds up
    above = torch.nextafter(torch.nextafter(half, torch.tensor(1.0)), torch.tensor(1.0))
    assert [int(num_kept(ratio, 1000)) for ratio in (half, above)] == [500, 499]


@given(importances, st.floats(0, 1, width=32))
def test_a_hard_mask_keeps_the_most_important_units_and_of_equal_ones_the_later(values, ratio):
    importance = torch.tensor(values)
    mask = hard_topk_mask(importance, torch.tensor(ratio)).bool()
    order = sorted(range(len(values)), key=lambda index: (importance[index].item(), index))
    assert [bool(mask[index]) for index in order] == sorted(bool(mask[index]) for index in order)


@pytest.mark.parametrize("units", [1, 2, 7, 64])
def test_ratio_zero_keeps_all_and_ratio_one_keeps_the_best(units):
    importance = torch.rand(units)
    assert hard_topk_mask(importance, torch.tensor(0.0)).sum() == units
    best = torch.zeros(units)
    best[importance.argmax()] = 1
    assert torch.equal(hard_topk_mask(importance, torch.tensor(1.0)), best)


def test_topk_mask_takes_a_count_per_row():
    mask = topk_mask(torch.tensor([[1.0, 3, 2], [3, 2, 1]]), torch.tensor([1, 2]))
    assert mask.tolist() == [[0, 1, 0], [1, 1, 0]]


# ---- soft masks ----
@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 100), st.sampled_from([1.0, 8.0]))
def test_a_soft_mask_is_above_a_half_exactly_where_the_hard_one_is_one(units, ratio, seed, multiple):
    importance = torch.rand(units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a = torch.tensor(ratio, dtype=torch.float64)
    soft = soft_topk_mask(importance, a, multiple * units)
    edge = abs(((1 - ratio) * units + 0.5) % 1) < 1e-6 or abs(((1 - ratio) * units + 0.5) % 1 - 1) < 1e-6
    if edge or (1 - ratio) * units < 0.5:  # at the edge between k and k + 1; the hard mask keeps at least one
        return
    assert torch.equal(soft > 0.5, hard_topk_mask(importance, a).bool())


def test_soft_masks_of_one_unit_and_at_both_ends():
    one = soft_topk_mask(torch.full((3, 1), 0.7), torch.tensor([0.0, 0.5, 1.0])).squeeze(-1)
    assert torch.allclose(one, torch.tensor([0.6225, 0.5, 0.3775]), atol=1e-4)
    lowest = soft_topk_mask(torch.arange(8.0), torch.tensor(0.0))
    assert torch.allclose(lowest[:3], torch.tensor([0.6225, 0.8176, 0.9241]), atol=1e-4)
    assert (soft_topk_mask(torch.arange(8.0), torch.tensor(1.0)) < 0.5).all()


def test_the_logarithm_of_a_soft_mask_is_its_logarithm():
    importance, ratio = torch.rand(3, 50, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for steepness in (None, 50.0, 400.0):
        expected = soft_topk_mask(importance, ratio, steepness)
        assert torch.allclose(log_soft_topk_mask(importance, ratio, steepness).exp(), expected, rtol=1e-12)
    assert torch.isfinite(log_soft_topk_mask(importance, ratio, 1e6)).all()


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from([0.5, 1.0, 8.0]))
def test_the_gradient_in_the_ratio_is_minus_lambda_m_one_minus_m(units, ratio, multiple):
    importance = torch.rand(units, dtype=torch.float64, generator=torch.Generator().manual_seed(units))
    a = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    steepness = multiple * units
    mask = soft_topk_mask(importance, a, steepness)
    jacobian = torch.stack([torch.autograd.grad(m, a, retain_graph=True)[0] for m in mask])
    assert torch.allclose(jacobian, -steepness * mask * (1 - mask), rtol=1e-9, atol=1e-12)


def test_gradcheck_and_no_gradient_to_importance():
    importance = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    for function in (soft_topk_mask, log_soft_topk_mask):
        assert torch.autograd.gradcheck(lambda a, function=function: function(importance.detach(), a), ratio)
        function(importance, ratio).sum().backward()
    assert importance.grad is None
    assert ratio.grad is not None
    assert not hard_topk_mask(importance, ratio).requires_grad


def test_the_default_steepness_is_the_number_of_units_raised_for_short_dims():
    assert [steepness_of(n) for n in (3, 32, 100, 256, 11008)] == [24.0, 256.0, 256.0, 256.0, 11008.0]
    assert steepness_of(100, 2.5) == 250.0


# ---- counts ----
@given(st.integers(1, 30), st.floats(0, 1))
def test_a_linear_count_sums_to_what_is_kept_with_the_same_slope_everywhere(units, share):
    importance = torch.rand(units, dtype=torch.float64, generator=torch.Generator().manual_seed(units))
    kept = torch.tensor(share * units, dtype=torch.float64, requires_grad=True)
    count = linear_topk_count(importance, kept)
    assert torch.isclose(count.sum(), kept)
    assert ((count >= 0) & (count <= 1)).all()
    if abs(share * units - round(share * units)) > 1e-9:
        assert torch.autograd.grad(count.sum(), kept)[0] == 1


def test_a_linear_count_at_a_whole_number_is_the_hard_mask():
    importance = torch.rand(4, 9)
    for kept in range(10):
        expected = topk_mask(importance, torch.tensor(kept).expand(4))
        assert torch.equal(linear_topk_count(importance, torch.full((4,), float(kept))), expected)


# ---- memory ----
class LargestOutput(TorchDispatchMode):
    """A mode that records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_memory_is_linear_in_the_number_of_units():
    layers, units = 32, 11008
    importance, ratio = torch.rand(layers, units), torch.full((layers,), 0.5, requires_grad=True)
    with LargestOutput() as recorder:
        soft_topk_mask(importance, ratio).sum().backward()
        hard_topk_mask(importance, ratio)
    assert recorder.numel == layers * units
