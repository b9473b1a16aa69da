from __future__ import annotations

import pytest
import torch

from fxlrd.factor.elimination import Reading, eliminate
from fxlrd.factor.interpolative import interpolate, least_squares, lost, residual
from fxlrd.factor.ridge import with_ridge
from tests.support.factors import decaying, mixed, second_moments


def reading(x, outputs=10, ridge=0.0):
    """What a random consumer reads of samples x."""
    weight = torch.randn(outputs, x.shape[1]).double()
    return Reading(second_moments(x), weight, ridge)


def fitted(read, retained):
    """The error of the least squares fit to the retained units, computed anew."""
    return lost(read.second, retained, least_squares(read.second, retained, read.ridge), read.weight)


def one_by_one(readings):
    """Backward elimination by its definition: at each step, every unit is tried."""
    remaining, order = list(range(len(readings[0].second))), []
    while len(remaining) > 1:
        trials = [torch.tensor([u for u in remaining if u != j]) for j in remaining]
        costs = [sum(fitted(r, trial) for r in readings) for trial in trials]
        order.append(remaining.pop(costs.index(min(costs))))
    return [*order, *remaining]


@pytest.mark.parametrize("consumers", [1, 3])
def test_each_unit_dropped_is_the_one_that_costs_least(consumers):
    readings = [reading(decaying(200, 16)) for _ in range(consumers)]
    assert eliminate(readings).dropped.tolist() == one_by_one(readings)


@pytest.mark.parametrize("units", [30, 200])
def test_the_errors_are_those_of_the_fits_at_every_number_of_units(units):
    readings = [reading(decaying(600, units)), reading(decaying(600, units))]
    elimination = eliminate(readings)
    assert sorted(elimination.dropped.tolist()) == list(range(units))
    assert elimination.error(units) == 0
    assert bool((elimination.errors.diff() >= 0).all())
    for count in range(0, units, 13):
        expected = sum(fitted(r, elimination.retained(count)) for r in readings)
        assert elimination.error(count) == pytest.approx(expected, rel=1e-8, abs=1e-14)


def test_fewer_units_are_some_of_more_wherever_it_stops():
    read = [reading(decaying(400, 100))]
    elimination = eliminate(read)
    for count in (1, 30, 77):
        stopped = eliminate(read, count)
        assert len(stopped.dropped) == 100 - count
        assert torch.equal(stopped.retained(count), elimination.retained(count))
        assert set(stopped.retained(count).tolist()) <= set(elimination.retained(count + 9).tolist())


@pytest.mark.parametrize(("units", "sources"), [(12, 3), (40, 10), (64, 63), (5, 1), (300, 40)])
def test_a_planted_dependence_is_recovered(units, sources):
    x = mixed(500, sources, units)
    read = reading(x)
    elimination = eliminate([read])
    retained = elimination.retained(sources)
    matrix, _, error = interpolate(read.second, retained, read.weight)
    torch.testing.assert_close(x[:, retained] @ matrix.mT, x, rtol=1e-7, atol=1e-7)
    assert error < 1e-7, "the square root of rounding"
    total = float((read.weight @ read.second * read.weight).sum())
    assert elimination.error(sources) < 1e-7 * total
    fewer = fitted(read, elimination.retained(sources - 1))
    assert elimination.error(sources - 1) == pytest.approx(fewer, rel=1e-4)


def test_after_dependent_units_have_gone_the_errors_are_as_exact():
    x = mixed(600, 40, 160)
    read = Reading(second_moments(x), torch.eye(160).double())
    elimination = eliminate([read])
    for count in (35, 20, 5):
        expected = fitted(read, elimination.retained(count))
        assert elimination.error(count) == pytest.approx(expected, rel=1e-6)


def test_copied_units_are_rebuilt_from_one_of_each():
    base = torch.randn(400, 6).double()
    copies = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2, 5, 5])
    read = reading(base[:, copies])
    retained = eliminate([read]).retained(6)
    assert sorted(copies[retained].tolist()) == list(range(6))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(20, 12),
        torch.randn(3, 12),
        torch.randn(1, 12),
        torch.ones(20, 12),
        torch.cat([torch.randn(50, 5), torch.zeros(50, 7)], dim=1),
        torch.cat([torch.randn(50, 6), 1e-7 * torch.randn(50, 6)], dim=1),
        torch.randn(9, 500),
    ],
    ids=["zeros", "three samples", "one sample", "constant", "dead units", "faint units", "wide"],
)
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e100])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_poor_data_give_finite_errors_and_each_unit_once(x, scale, ridge):
    units = x.shape[1]
    read = Reading(second_moments(x.double()) * scale, torch.eye(units).double(), ridge)
    elimination = eliminate([read], 0 if units < 100 else 450)
    assert len(set(elimination.dropped.tolist())) == len(elimination.dropped)
    assert elimination.errors.isfinite().all()
    assert bool((elimination.errors.diff() >= 0).all())
    for count in {1, 4, 11, units} if units < 100 else {450, units}:
        retained = elimination.retained(count)
        assert len(retained) == count
        matrix, _, error = interpolate(read.second, retained, read.weight, ridge)
        assert matrix.isfinite().all()
        assert 0 <= error <= 1 + 1e-9


def test_moments_that_are_not_quite_positive_semidefinite_are_eliminated_all_the_same():
    x = mixed(400, 5, 40)
    g = second_moments(x)
    noise = torch.randn(40, 40).double()
    read = Reading(g + 1e-9 * g.diagonal().mean() * (noise + noise.mT), torch.eye(40).double())
    elimination = eliminate([read])
    assert sorted(elimination.dropped.tolist()) == list(range(40))
    assert elimination.errors.isfinite().all()
    assert elimination.error(5) < 1e-4 * elimination.error(0)


def test_units_that_carry_nothing_are_dropped_first():
    x = torch.randn(300, 10).double() * torch.tensor([100.0, *[1] * 9])
    x[:, [4, 7]] = 0
    read = reading(x)
    read.weight[:, 0] = 0  # nobody reads the loudest
    elimination = eliminate([read])
    assert elimination.dropped[:3].tolist() == [0, 4, 7]
    assert elimination.errors[3] == 0


def test_a_consumer_of_more_outputs_than_units_is_that_of_as_much_importance():
    x = decaying(300, 12)
    x[:, 3] = 0
    weight = torch.randn(40, 12).double()
    weight[:, 7] = 0
    whole = eliminate([Reading(second_moments(x), weight)])
    parts = eliminate([Reading(second_moments(x), part) for part in weight.split(10)])
    assert whole.dropped.tolist() == parts.dropped.tolist()
    assert set(whole.dropped[:2].tolist()) == {3, 7}
    torch.testing.assert_close(whole.errors, parts.errors, rtol=1e-10, atol=1e-14)
    assert whole.errors[2] == 0


def test_a_ridge_counts_in_the_error():
    x = decaying(200, 24)
    read = reading(x, ridge=0.1)
    elimination = eliminate([read])
    for count in (20, 12, 3):
        retained = elimination.retained(count)
        matrix = least_squares(read.second, retained, 0.1)
        moments = with_ridge(read.second, 0.1)
        expected = lost(moments, retained, matrix, read.weight)
        assert elimination.error(count) == pytest.approx(expected, rel=1e-9)


def test_importance_gives_a_lower_error_than_energy_or_chance():
    by_weight, by_energy, by_chance = [], [], []
    for seed in range(20):
        torch.manual_seed(seed)
        g = second_moments(decaying(300, 30))
        weight = torch.randn(12, 30).double() * torch.rand(30).double().square()

        def error(retained, g=g, weight=weight):
            return residual(g, retained, least_squares(g, retained), weight)

        by_weight.append(error(eliminate([Reading(g, weight)]).retained(8)))
        by_energy.append(error(eliminate([Reading(g, torch.eye(30))]).retained(8)))
        chance = [error(torch.randperm(30)[:8].sort().values) for _ in range(10)]
        by_chance.append(sum(chance) / len(chance))
        assert by_weight[-1] <= by_chance[-1]
    assert sum(by_weight) < sum(by_energy) < sum(by_chance)
