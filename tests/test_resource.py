"""Counts are polynomials in the sizes; the resource loss; the falling target."""

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dms import resource
from hf_dms.config import DMSConfig
from hf_dms.resource import Cost, resource_loss, scheduled_target

COST = Cost(
    model={("hidden",): 7.0, (): 3.0},
    stacks={
        "layers": {
            ("hidden", "mlp"): torch.tensor([3.0, 3.0, 2.0], dtype=torch.float64),
            ("kv",): torch.tensor([5.0, 0.0, 1.0], dtype=torch.float64),
        }
    },
)


def sizes(hidden, mlp, kv):
    return {"hidden": torch.tensor([hidden]), "mlp": torch.tensor(mlp), "kv": torch.tensor(kv)}


def test_docstring_examples():
    result = doctest.testmod(resource)
    assert result.attempted >= 2
    assert result.failed == 0


def brute_force(hidden, mlp, kv, layers_kept=(1, 1, 1)):
    layers = [3 * hidden * mlp[0] + 5 * kv[0], 3 * hidden * mlp[1], 2 * hidden * mlp[2] + kv[2]]
    return 7 * hidden + 3 + sum(cost * kept for cost, kept in zip(layers, layers_kept))


@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_the_polynomial_equals_brute_force(hidden, widths, kept):
    mlp, kv = widths[:3], widths[3:]
    assert float(COST.count(sizes(hidden, mlp, kv))) == brute_force(hidden, mlp, kv)
    counted = COST.count(sizes(hidden, mlp, kv), {"layers": torch.tensor(kept)})
    assert float(counted) == brute_force(hidden, mlp, kv, kept)
    inside = COST.layers_only().count(sizes(hidden, mlp, kv))
    assert float(inside) == brute_force(hidden, mlp, kv) - 7 * hidden - 3


def test_each_stack_is_counted_with_its_own_layers_kept():
    two = Cost(
        model={(): 3.0},
        stacks={
            "layers0": {("mlp0",): torch.tensor([2.0, 2.0], dtype=torch.float64)},
            "layers1": {("mlp1",): torch.tensor([5.0, 5.0, 7.0], dtype=torch.float64)},
        },
    )
    found = {"mlp0": torch.tensor([1, 2]), "mlp1": torch.tensor([1, 2, 3])}
    assert float(two.count(found)) == 3 + 2 * 3 + 5 * 3 + 7 * 3
    kept = {"layers0": torch.tensor([0, 1]), "layers1": torch.tensor([1, 0, 1])}
    assert float(two.count(found, kept)) == 3 + 4 + 5 + 21
    assert float(two.count(found, {"layers1": kept["layers1"]})) == 3 + 6 + 26


def test_batched_counts_equal_single_ones():
    states = list(itertools.product([2, 5], [[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [2, 3, 4]]))
    batch = {
        "hidden": torch.tensor([[hidden] for hidden, _, _ in states]),
        "mlp": torch.tensor([mlp for _, mlp, _ in states]),
        "kv": torch.tensor([kv for _, _, kv in states]),
    }
    assert COST.count(batch).tolist() == [brute_force(*state) for state in states]


def test_a_count_is_exact_in_float64_and_differentiable():
    big = {"hidden": torch.tensor([8192.0], requires_grad=True), "mlp": torch.full((3,), 28672.0), "kv": torch.ones(3)}
    total = COST.count(big)
    assert total.dtype == torch.float64
    assert total.item() == brute_force(8192, [28672] * 3, [1] * 3)
    total.backward()
    assert float(big["hidden"].grad) == 7 + 8 * 28672


# ---- the loss ----
@given(st.floats(0.01, 10), st.floats(0.01, 1))
def test_the_loss_is_log_of_the_excess_above_the_target_and_zero_at_or_below(found, target):
    r = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    loss = resource_loss(r, target)
    assert float(loss.detach()) == pytest.approx(max(math.log(found / target), 0.0), abs=1e-12)
    loss.backward()
    if found != target:
        assert float(r.grad) == pytest.approx(1 / found if found > target else 0.0)


def test_the_loss_does_not_depend_on_the_unit():
    r = torch.tensor([0.3, 0.6, 0.9])
    assert torch.allclose(resource_loss(r * 1e9, 0.5 * 1e9), resource_loss(r, 0.5), atol=1e-6)


# ---- the target ----
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_geometric_target_falls_from_one_to_the_target_and_stays(target, ramp, first, second):
    early, late = sorted((first, second))
    assert scheduled_target(target, 0.0, ramp) == 1.0
    assert scheduled_target(target, ramp, ramp) == scheduled_target(target, 1.0, ramp) == pytest.approx(target)
    assert scheduled_target(target, early, ramp) >= scheduled_target(target, late, ramp)
    middle = scheduled_target(target, ramp / 2, ramp)
    assert middle**2 == pytest.approx(target)


def test_a_constant_target_is_constant():
    assert {scheduled_target(0.3, progress, schedule="constant") for progress in (0.0, 0.5, 1.0)} == {0.3}


def test_a_target_falls_over_as_much_of_a_search_as_in_a_config_by_default():
    ramp = DMSConfig(target=0.3).target_ramp
    assert scheduled_target(0.3, 0.35) == scheduled_target(0.3, 0.35, ramp) > scheduled_target(0.3, 0.35, ramp / 2)
