from __future__ import annotations

import pytest
import torch

from fxlrd.factor.ridge import _PREDICTED, GRID, _Half, best_ridge, with_ridge
from fxlrd.factor.whiten import root, whitened_svd
from fxlrd.layers.fit import Moments
from tests.support.factors import svd_product


def moments(x: torch.Tensor) -> Moments:
    found = Moments.empty(x.shape[1], x.device)
    found.add(x)
    return found


def unseen_error(weight: torch.Tensor, seen: torch.Tensor, unseen: torch.Tensor, ridge: float) -> float:
    """The relative squared error, on other inputs, of factors of rank 128 fitted with a ridge."""
    covariance = seen.mT @ seen / len(seen)
    product = svd_product(whitened_svd(weight[None], 128, root(with_ridge(covariance, ridge)[None])))[0]
    return float(((unseen @ (weight - product).mT).norm() / (unseen @ weight.mT).norm()) ** 2)


@pytest.mark.parametrize("positions", [36, 288, 2304])
def test_factors_of_data_of_low_rank_are_about_as_good_as_with_the_better_of_two_ridges(positions):
    torch.manual_seed(0)
    weight, basis = torch.randn(256, 256).double(), torch.randn(128, 256).double()
    seen, unseen = torch.randn(positions, 128).double() @ basis, torch.randn(1000, 128).double() @ basis
    fixed = 1e-2 * max(0.0, 256 / positions - 0.25)
    errors = [unseen_error(weight, seen, unseen, ridge) for ridge in (moments(seen).ridge, fixed, 0.0)]
    assert errors[0] <= 1.05 * min(errors[1:]) + 1e-9


@pytest.mark.parametrize("positions", [30, 60, 120, 240])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_ridge_is_near_the_best_of_the_grid_for_regression_on_other_samples(positions, scale):
    torch.manual_seed(1)
    mix = torch.randn(40, 40).double() * torch.logspace(0, -2, 40).double()
    mix = mix @ torch.linalg.qr(torch.randn(40, 40).double()).Q * torch.logspace(0, 3, 40).double()
    seen, unseen = (torch.randn(n, 40).double() @ mix * scale for n in (positions, 4000))

    def error(ridge):
        g = with_ridge(seen.mT @ seen / positions, ridge)
        inner, cross = g[:20, :20], g[20:, :20]
        matrix = torch.linalg.solve(inner + 1e-12 * inner.diagonal().diag(), cross.mT).mT
        size = unseen[:, 20:].square().mean(0)
        return float(((unseen[:, 20:] - unseen[:, :20] @ matrix.mT).square().mean(0) / size).sum())

    assert error(moments(seen).ridge) <= 1.25 * min(error(ridge) for ridge in (0.0, *GRID))


def test_other_positions_of_the_same_moments_ask_for_no_ridge():
    x = torch.randn(30, 200).double()
    assert best_ridge(x.cov(correction=0), (x - x.mean(1, keepdim=True)).mT) == 0


def test_channels_that_never_vary_do_not_matter():
    x = torch.randn(40, 12).double()
    more = torch.cat([x, torch.zeros(40, 3).double()], 1)
    assert moments(more).ridge == moments(x).ridge
    assert moments(torch.ones(30, 4)).ridge < GRID[-1]


def test_of_many_channels_some_are_predicted_for_all():
    torch.manual_seed(0)
    width = 4 * _PREDICTED + 2
    mix = torch.randn(width // 8, width).double()
    x = torch.randn(2 * width, width // 8).double() @ mix + 0.5 * torch.randn(2 * width, width).double()
    fitted, others = x[:width], x[width:]
    covariance = fitted.mT @ fitted / len(fitted)
    halves = [_Half(covariance, others, slice(i, None, 2), slice(1 - i, None, 2)) for i in (0, 1)]
    for half, made in zip(halves, (slice(1, None, 2), slice(0, None, 2)), strict=True):
        assert half.wanted.shape[1] <= _PREDICTED
        reads = slice(1 - made.start, None, 2)
        inner = covariance[reads, reads] + 0.1 * torch.eye(width // 2).double()
        wrong = others[:, made] - others[:, reads] @ torch.linalg.solve(inner, covariance[reads, made])
        every = wrong.square().mean(0)
        noise = 3 * float(every.std()) * width / 2 / half.wanted.shape[1] ** 0.5
        assert half.error(0.1) == pytest.approx(float(every.sum()), abs=noise)
