from __future__ import annotations

import pytest
import torch

from fxlrd.factor.interpolative import interpolate, least_squares, residual, select
from tests.support.factors import second_moments


def mixed(samples: int, sources: int, channels: int) -> torch.Tensor:
    """Return samples of channels that are linear functions of ``sources`` of them."""
    return torch.randn(samples, sources).double() @ torch.randn(sources, channels).double()


def decaying(samples: int, channels: int) -> torch.Tensor:
    scale = 1 / torch.arange(1, channels + 1).double()
    return torch.randn(samples, channels).double() * scale @ torch.randn(channels, channels).double()


@pytest.mark.parametrize(("channels", "rank"), [(12, 3), (40, 10), (64, 63), (5, 1)])
def test_a_planted_dependence_is_recovered(channels, rank):
    x = mixed(500, rank, channels)
    retained, matrix, error = interpolate(second_moments(x), rank)
    assert len(retained) == len(set(retained.tolist())) == rank
    assert torch.equal(retained, retained.sort().values)
    torch.testing.assert_close(x[:, retained] @ matrix.mT, x, rtol=1e-8, atol=1e-8)
    assert error < 1e-7, "the square root of rounding"


def test_retained_channels_pass_through_unchanged():
    retained, matrix, _ = interpolate(second_moments(decaying(300, 24)), 9)
    assert torch.equal(matrix[retained], torch.eye(9).double())


def test_copied_channels_are_interpolated_exactly():
    base = torch.randn(400, 6).double()
    order = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2, 5, 5])
    retained, matrix, error = interpolate(second_moments(base[:, order]), 6)
    assert sorted(order[retained].tolist()) == list(range(6))
    torch.testing.assert_close(matrix.abs().sum(1), torch.ones(10).double(), rtol=1e-9, atol=1e-9)
    assert error < 1e-7


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(20, 12),
        torch.randn(3, 12),
        torch.randn(1, 12),
        torch.ones(20, 12),
        torch.cat([torch.randn(50, 5), torch.zeros(50, 7)], dim=1),
        torch.cat([torch.randn(50, 6), 1e-7 * torch.randn(50, 6)], dim=1),
    ],
    ids=["zeros", "three samples", "one sample", "constant", "dead channels", "faint channels"],
)
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e100])
def test_poor_data_give_finite_interpolations(x, scale):
    for rank in (1, 4, 11, 12):
        retained, matrix, error = interpolate(second_moments(x.double()) * scale, rank)
        assert len(set(retained.tolist())) == rank
        assert matrix.isfinite().all()
        assert torch.equal(matrix[retained], torch.eye(rank).double())
        assert 0 <= error <= 1 + 1e-9
        assert error == 0 or rank < 12


def test_channels_of_small_scale_are_fitted_as_exactly_as_large_ones():
    x = mixed(400, 3, 6)
    x = torch.cat([x, 1e-8 * x.flip(0)[:, :3]], dim=1)
    retained = torch.tensor([0, 1, 2, 6, 7, 8])
    matrix = least_squares(second_moments(x), retained)
    torch.testing.assert_close(x[:, retained] @ matrix.mT, x, rtol=1e-6, atol=1e-12)


def test_dead_channels_are_picked_last():
    x = torch.cat([torch.zeros(50, 5), torch.randn(50, 5)], dim=1).double()
    assert interpolate(second_moments(x), 5).retained.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("rank", [1, 5, 17])
def test_the_predicted_error_is_the_consumers_on_these_samples(rank):
    x, weight = decaying(200, 24), torch.randn(10, 24).double()
    retained, matrix, error = interpolate(second_moments(x), rank, weight.mT @ weight)
    reference = x @ weight.mT
    measured = (x[:, retained] @ matrix.mT @ weight.mT - reference).norm() / reference.norm()
    assert error == pytest.approx(measured.item(), rel=1e-9)


def test_the_fit_is_least_squares():
    x = decaying(200, 24)
    retained = torch.tensor([2, 3, 11, 20])
    expected = torch.linalg.lstsq(x[:, retained], x).solution.mT
    torch.testing.assert_close(least_squares(second_moments(x), retained), expected, rtol=1e-9, atol=1e-9)


def test_a_ridge_shrinks_and_never_lowers_the_error():
    g, retained, unit = second_moments(decaying(200, 24)), torch.arange(0, 24, 3), torch.eye(24).double()
    plain, shrunk = (least_squares(g, retained, ridge) for ridge in (0.0, 0.5))
    assert shrunk.norm() < plain.norm()
    assert residual(g, retained, plain, unit) < residual(g, retained, shrunk, unit)
    assert torch.equal(shrunk[retained], torch.eye(8).double())


def test_a_channel_that_no_consumer_reads_is_not_retained():
    x = torch.randn(300, 8).double() * torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
    weight = torch.randn(5, 8).double()
    weight[:, 0] = 0
    assert 0 not in interpolate(second_moments(x), 4, weight.mT @ weight).retained
    assert 0 in interpolate(second_moments(x), 4).retained


def test_importance_gives_a_lower_error_than_energy_or_chance():
    by_weight, by_energy, by_chance = [], [], []
    for seed in range(20):
        torch.manual_seed(seed)
        g = second_moments(decaying(300, 30))
        weight = torch.randn(12, 30).double() * torch.rand(30).double().square()
        a = weight.mT @ weight

        def error(retained, g=g, a=a):
            return residual(g, retained, least_squares(g, retained), a)

        by_weight.append(interpolate(g, 8, a).error)
        by_energy.append(error(interpolate(g, 8).retained))
        chance = [error(torch.randperm(30)[:8].sort().values) for _ in range(10)]
        by_chance.append(sum(chance) / len(chance))
        assert by_weight[-1] <= by_chance[-1]
    assert sum(by_weight) < sum(by_energy) < sum(by_chance)


def test_wide_tensors_are_picked_in_blocks():
    channels = 1100
    g, unit = second_moments(mixed(1500, 40, channels)), torch.eye(channels).double()
    retained = select(g, 40, unit)
    assert len(set(retained.tolist())) == 40
    # In float32, and by blocks: not one for each of the 40 sources, but what they leave is little.
    assert residual(g, retained, least_squares(g, retained), unit) < 1e-2
    chance = torch.randperm(channels)[:20].sort().values
    fewer = select(g, 20, unit)
    assert residual(g, fewer, least_squares(g, fewer), unit) < residual(g, chance, least_squares(g, chance), unit)


@pytest.mark.parametrize("x", [torch.zeros(4, 1100), torch.ones(4, 1100), torch.eye(1100)[:3], torch.randn(9, 1100)])
def test_poor_wide_tensors_give_each_channel_once(x):
    retained = select(second_moments(x.double()) * 1e60, 700, torch.eye(1100).double())
    assert len(set(retained.tolist())) == 700
