"""The order of a map's units: the cost of a removal, the refit of the rest, and the effect of the metric."""

import itertools

import pytest
import torch

from hf_dms.refit.order import eliminate


def problem(inputs=6, outputs=4, seed=0):
    """Gram matrix, moment, a positive definite metric, and the sum of squares of the targets, all from one sample."""
    generator = torch.Generator().manual_seed(seed)
    a = (
        torch.randn(40, inputs, generator=generator).double()
        @ torch.randn(inputs, inputs, generator=generator).double()
    )
    r = a @ torch.randn(inputs, outputs, generator=generator).double()
    r += torch.randn(40, outputs, generator=generator).double()
    root = torch.randn(outputs, outputs, generator=generator).double()
    return a.T @ a, a.T @ r, root @ root.T, a, r


def error_on(inputs, a, r, metric):
    """The weighted squared error of the least-squares refit on some inputs."""
    left = r if not inputs else r - a[:, inputs] @ torch.linalg.lstsq(a[:, inputs], r).solution
    return float(torch.trace(left @ metric @ left.T))


def cheapest_order(units, keep, cost_of):
    """Greedy elimination by brute force: the units in the order of removal, and by how much each raises the error."""
    alive, gone = list(range(len(units))), []
    while len(alive) > keep:
        growth = {u: cost_of([v for v in alive if v != u]) - cost_of(alive) for u in alive}
        worst = min(growth, key=growth.get)
        gone.append((worst, growth[worst]))
        alive.remove(worst)
    return alive, gone


UNITS = {"single inputs": torch.arange(6)[:, None], "blocks of two": torch.tensor([[0, 3], [1, 2], [4, 5]])}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_each_removal_costs_what_the_weighted_error_of_the_refit_grows_by(units, weighted):
    gram, moment, metric, a, r = problem()
    units, metric = UNITS[units], metric if weighted else torch.eye(4).double()

    def cost_of(alive):
        return error_on([i for unit in alive for i in units[unit].tolist()], a, r, metric)

    found = eliminate(gram, moment, units, metric if weighted else None)
    stay, gone = cheapest_order(units, 1, cost_of)
    assert found.order.tolist() == stay + [unit for unit, _ in gone[::-1]]
    expected = torch.tensor([cost for _, cost in gone[::-1]], dtype=torch.float64)
    assert torch.allclose(found.costs[1:], expected, rtol=1e-8)
    assert found.costs[0] == torch.inf


def test_numbers_worked_by_hand():
    # H = [[2, 1], [1, 1]], so H⁻¹ = [[1, -1], [-1, 2]]. M = (3, 2), so W = (1, 1). Costs: 1²/1 = 1 and 1²/2 = 1/2.
    gram, moment = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([[3.0], [2.0]]).double()
    found = eliminate(gram, moment, torch.arange(2)[:, None])
    assert found.order.tolist() == [0, 1]
    assert found.costs.tolist() == pytest.approx([torch.inf, 0.5])
    weighted = eliminate(gram, moment, torch.arange(2)[:, None], metric=torch.tensor([[4.0]]).double())
    assert weighted.costs.tolist() == pytest.approx([torch.inf, 2.0])


def test_a_metric_can_turn_the_order_round():
    gram, moment = torch.eye(2).double(), torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    assert eliminate(gram, moment, torch.arange(2)[:, None]).order.tolist() == [0, 1]
    metric = torch.diag(torch.tensor([1.0, 9.0])).double()
    assert eliminate(gram, moment, torch.arange(2)[:, None], metric).order.tolist() == [1, 0]


@pytest.mark.parametrize("block", [2, 3, 5])
def test_costs_inside_a_block_are_exact_for_the_order_they_are_listed_in(block):
    gram, moment, metric, *_ = problem(inputs=40, seed=3)
    gram += 0.1 * torch.eye(40).double()  # 40 positions give a singular matrix
    found = eliminate(gram, moment, torch.arange(40)[:, None], metric, block=block)

    def explained(kept):
        """The part of the damped problem's error that a refit removes."""
        refit = torch.linalg.solve(gram[kept][:, kept], moment[kept])
        return float(torch.trace(metric @ refit.T @ moment[kept]))

    for k in range(1, 40):
        first = found.order.tolist()
        assert explained(first[: k + 1]) - explained(first[:k]) == pytest.approx(float(found.costs[k]), rel=1e-6)


def test_inputs_of_no_unit_always_stay_in_the_refit():
    gram, moment, metric, a, r = problem()
    units = torch.arange(5)[:, None]  # input 5 is a bias
    found = eliminate(gram, moment, units, metric)
    alive = [[*found.order[:k].tolist(), 5] for k in range(1, 6)]
    growth = [error_on(few, a, r, metric) - error_on(more, a, r, metric) for few, more in itertools.pairwise(alive)]
    assert torch.allclose(found.costs[1:], torch.tensor(growth, dtype=torch.float64), rtol=1e-8)


def test_units_that_are_kept_stand_first_and_cost_infinitely_much():
    gram, moment, metric, *_ = problem()
    whole = eliminate(gram, moment, torch.arange(6)[:, None], metric)
    found = eliminate(gram, moment, torch.arange(6)[:, None], metric, keep=3)
    assert set(found.order[:3].tolist()) == set(whole.order[:3].tolist())
    assert found.order[3:].tolist() == whole.order[3:].tolist()
    assert found.costs[:3].isinf().all()
    assert torch.allclose(found.costs[3:], whole.costs[3:])
