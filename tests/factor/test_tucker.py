from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fxlrd.factor.basis import EXCESS
from fxlrd.factor.tucker import tucker2
from tests.support.factors import tucker_product

SHAPES = [(1, 12, 20, 3, 3), (1, 20, 12, 3, 2), (3, 8, 8, 1, 3), (2, 16, 4, 3, 3), (1, 6, 7, 5), (2, 5, 1, 3, 3)]


def tails(w, rank_in, rank_out):
    """Relative truncated tails of the two channel unfoldings."""
    w = w.double()
    by_in = torch.linalg.svdvals(w.transpose(1, 2).flatten(2))[:, rank_in:]
    by_out = torch.linalg.svdvals(w.flatten(2))[:, rank_out:]
    return by_in.norm().item() / w.norm().item(), by_out.norm().item() / w.norm().item()


def actual(w, triple):
    return ((w.double() - tucker_product(triple)).norm() / w.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_error_lies_between_the_tails_and_the_hosvd_bound(shape, sweeps):
    w = torch.randn(shape, dtype=torch.float64)
    groups, s, c = shape[:3]
    for r1, r2 in [(1, 1), (1, s), (c, 1), (c, max(1, s // 2)), (max(1, c // 2), max(1, s // 3))]:
        triple = tucker2(w, r1, r2, sweeps)
        assert triple.first.shape == (groups, r1, c)
        assert triple.core.shape == (groups, r2, r1, *shape[3:])
        assert triple.last.shape == (groups, s, r2)
        assert triple.first.dtype == triple.core.dtype == triple.last.dtype == torch.float64
        by_in, by_out = tails(w, r1, r2)
        assert triple.error == pytest.approx(actual(w, triple), rel=1e-10, abs=1e-13)
        assert max(by_in, by_out) - 1e-13 <= triple.error <= (by_in**2 + by_out**2) ** 0.5 + 1e-13


@pytest.mark.parametrize("decay", [0.0, 1.0, 4.0])
def test_float32_error_is_within_the_bound_and_its_excess(decay):
    w = torch.randn(2, 12, 16, 3, 3, dtype=torch.float64)
    w = w * 10 ** (-decay * torch.arange(16, dtype=w.dtype).view(16, 1, 1) / 5)
    w = (w * 10 ** (-decay * torch.arange(12, dtype=w.dtype).view(12, 1, 1, 1) / 5)).float()
    for r1, r2 in [(2, 2), (4, 6), (8, 2), (10, 10)]:
        triple = tucker2(w, r1, r2)
        assert triple.first.dtype == triple.core.dtype == triple.last.dtype == torch.float32
        by_in, by_out = tails(w, r1, r2)
        rounding = 2 * torch.finfo(torch.float32).eps
        assert max(by_in, by_out) - rounding <= actual(w, triple)
        assert actual(w, triple) <= (by_in**2 + by_out**2) ** 0.5 * (1 + EXCESS) + rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_orthonormal(shape):
    triple = tucker2(torch.randn(shape, dtype=torch.float64), max(1, shape[2] // 2), max(1, shape[1] // 2))
    for basis in (triple.first, triple.last.mT):
        eye = torch.eye(basis.shape[1], dtype=basis.dtype).expand(shape[0], -1, -1)
        torch.testing.assert_close(basis @ basis.mT, eye, rtol=0, atol=1e-13)


def test_error_never_rises_with_sweeps():
    w = torch.randn(2, 14, 10, 3, 3, dtype=torch.float64)
    errors = [tucker2(w, 3, 4, sweeps).error for sweeps in range(1, 8)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape):
    w = torch.randn(shape, dtype=torch.float64)
    triple = tucker2(w, shape[2], shape[1])
    torch.testing.assert_close(tucker_product(triple), w, rtol=0, atol=1e-12)
    assert triple.error < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_forms_have_the_error_of_one_tail(shape):
    w = torch.randn(shape, dtype=torch.float64)
    r1, r2 = max(1, shape[2] // 2), max(1, shape[1] // 2)
    by_in, by_out = tails(w, r1, r2)
    inward, outward = tucker2(w, r1, None), tucker2(w, None, r2)
    assert inward.last is None
    assert outward.first is None
    assert inward.core.shape == (*shape[:2], r1, *shape[3:])
    assert outward.core.shape == (shape[0], r2, *shape[2:])
    for triple, tail in ((inward, by_in), (outward, by_out)):
        assert triple.error == pytest.approx(tail, rel=1e-10, abs=1e-13)
        assert actual(w, triple) == pytest.approx(tail, rel=1e-10, abs=1e-13)


def test_no_mode_cut_leaves_the_weight():
    w = torch.randn(1, 4, 5, 3, 3, dtype=torch.float64)
    triple = tucker2(w, None, None)
    assert (triple.first, triple.last, triple.error) == (None, None, 0)
    torch.testing.assert_close(triple.core, w, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_ranks_are_reproduced(dtype):
    core = torch.randn(1, 4, 3, 3, 3, dtype=dtype)
    first, last = torch.randn(3, 20, dtype=dtype), torch.randn(24, 4, dtype=dtype)
    w = torch.einsum("gabkl,bc,sa->gsckl", core, first, last)
    assert tucker2(w, 3, 4).error <= 20 * torch.finfo(dtype).eps
    assert tucker2(w, 6, 9).error <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_weight(dtype):
    triple = tucker2(torch.zeros(2, 6, 5, 3, 3, dtype=dtype), 2, 3, sweeps=2)
    assert triple.error == 0
    assert tucker_product(triple).abs().max() == 0
    assert triple.first.isfinite().all()
    assert triple.last.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22])
def test_the_scale_of_the_weight_does_not_matter(scale):
    w = torch.randn(1, 12, 16, 3, 3, dtype=torch.float64)
    triple = tucker2((w * scale).float(), 4, 5)
    expected = tucker2(w.float(), 4, 5).error
    assert triple.error == pytest.approx(expected, rel=1e-5)
    assert ((w - tucker_product(triple) / scale).norm() / w.norm()).item() == pytest.approx(expected, rel=1e-5)
