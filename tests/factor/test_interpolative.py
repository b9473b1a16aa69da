from __future__ import annotations

import pytest
import torch

from fxlrd.factor.interpolative import interpolate, least_squares, residual
from tests.support.factors import decaying, mixed, second_moments


def test_retained_channels_pass_through_unchanged():
    retained = torch.tensor([0, 3, 4, 17, 20])
    matrix, shift, _ = interpolate(second_moments(decaying(300, 24)), retained, torch.eye(24))
    assert torch.equal(matrix[retained], torch.eye(5).double())
    assert shift is None


def test_channels_of_small_scale_are_fitted_as_exactly_as_large_ones():
    x = mixed(400, 3, 6)
    x = torch.cat([x, 1e-8 * x.flip(0)[:, :3]], dim=1)
    retained = torch.tensor([0, 1, 2, 6, 7, 8])
    matrix = least_squares(second_moments(x), retained)
    torch.testing.assert_close(x[:, retained] @ matrix.mT, x, rtol=1e-6, atol=1e-12)


def test_the_predicted_error_is_the_consumers_on_these_samples():
    x, weight = decaying(200, 24), torch.randn(10, 24).double()
    retained = torch.tensor([1, 6, 7, 18])
    matrix, _, error = interpolate(second_moments(x), retained, weight)
    reference = x @ weight.mT
    measured = (x[:, retained] @ matrix.mT @ weight.mT - reference).norm() / reference.norm()
    assert error == pytest.approx(measured.item(), rel=1e-9)


def test_with_a_constant_the_fit_is_least_squares_with_an_intercept():
    x, weight = decaying(200, 24) + torch.randn(24).double(), torch.randn(10, 24).double()
    retained = torch.tensor([2, 3, 11, 20])
    columns = torch.cat([x[:, retained], torch.ones(200, 1).double()], 1)
    expected = torch.linalg.lstsq(columns, x).solution.mT
    matrix, shift, error = interpolate(x.mT.cov(correction=0), retained, weight, mean=x.mean(0))
    torch.testing.assert_close(matrix, expected[:, :-1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(shift, expected[:, -1], rtol=1e-8, atol=1e-10)
    reference = (x - x.mean(0)) @ weight.mT
    measured = ((x - columns @ expected.mT) @ weight.mT).norm() / reference.norm()
    assert error == pytest.approx(measured.item(), rel=1e-9)


def test_the_fit_is_least_squares():
    x = decaying(200, 24)
    retained = torch.tensor([2, 3, 11, 20])
    expected = torch.linalg.lstsq(x[:, retained], x).solution.mT
    torch.testing.assert_close(least_squares(second_moments(x), retained), expected, rtol=1e-9, atol=1e-9)


def test_a_ridge_is_that_much_more_of_each_variance():
    x, retained = decaying(200, 24), torch.arange(0, 24, 3)
    g = second_moments(x)
    plain, shrunk = (least_squares(g, retained, ridge) for ridge in (0.0, 0.5))
    more = g + 0.5 * g.diagonal().diag()
    expected = torch.linalg.solve(more[retained][:, retained], g[retained]).mT
    others = [c for c in range(24) if c % 3]
    torch.testing.assert_close(shrunk[others], expected[others], rtol=1e-9, atol=1e-12)
    assert residual(g, retained, plain, torch.eye(24)) < residual(g, retained, shrunk, torch.eye(24))
    assert torch.equal(shrunk[retained], torch.eye(8).double())


def test_retained_channels_that_depend_on_each_other_rebuild_what_they_can():
    x = mixed(400, 3, 8)
    retained = torch.arange(5)  # of which any three carry all there is
    matrix = least_squares(second_moments(x), retained)
    torch.testing.assert_close(x[:, retained] @ matrix.mT, x, rtol=0, atol=1e-7)
