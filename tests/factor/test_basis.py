from __future__ import annotations

import math

import pytest
import torch

from fxlrd.factor import basis
from fxlrd.factor.basis import EXCESS, _accurate, left_basis, magnitude

EPS = torch.finfo(torch.float32).eps


def spectrum(name, n):
    i = torch.arange(n, dtype=torch.float64)
    return {"flat": torch.ones_like(i), "slow": 1 / (1 + i), "steep": 10 ** (-i / 5), "cliff": 1e-4 ** (i > n // 4)}[
        name
    ]


def matrix(values, m, n):
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]
    return u * values @ v.T


def residual_norm(m, u):
    m, u = m.double(), u.double()
    return torch.linalg.norm(m - u @ (u.mT @ m), dim=(-2, -1))


def tail(m, rank):
    return torch.linalg.svdvals(m.double())[..., rank:].norm(dim=-1)


@pytest.fixture
def methods(monkeypatch):
    """The decompositions that ran, in order, each with its dtype."""
    ran = []
    for name in ("eigh", "svd"):
        real = getattr(torch.linalg, name)

        def record(a, *args, _name=name, _real=real, **kwargs):
            ran.append((_name, a.dtype))
            return _real(a, *args, **kwargs)

        monkeypatch.setattr(basis.torch.linalg, name, record)
    return ran


@pytest.mark.parametrize(("m", "n"), [(24, 24), (16, 60), (60, 16)])
@pytest.mark.parametrize("name", ["flat", "slow", "steep", "cliff"])
def test_float64_error_is_the_truncated_tail(name, m, n):
    w = matrix(spectrum(name, min(m, n)), m, n)
    for rank in (1, 3, min(m, n) // 2, min(m, n) - 1):
        u = left_basis(w, rank)
        assert (u.dtype, u.shape) == (torch.float64, (m, rank))
        torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=u.dtype), rtol=0, atol=1e-13)
        optimal = tail(w, rank)
        assert optimal * (1 - 1e-9) <= residual_norm(w, u) + 1e-15
        assert residual_norm(w, u) <= optimal * (1 + EXCESS) + 1e-14


@pytest.mark.parametrize(("m", "n"), [(40, 40), (24, 90), (90, 24)])
@pytest.mark.parametrize("name", ["flat", "slow", "steep", "cliff"])
def test_float32_error_is_within_the_excess_of_the_optimal_one(name, m, n):
    w = matrix(spectrum(name, min(m, n)), m, n).float()
    norm = torch.linalg.norm(w.double())
    for rank in (1, 4, min(m, n) // 2, min(m, n) - 1):
        u = left_basis(w, rank)
        assert (u.dtype, u.shape) == (torch.float32, (m, rank))
        torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=4e-6)
        optimal = tail(w, rank)
        # A basis held in float32 cannot do better than its own rounding, which adds in quadrature.
        assert residual_norm(w, u) <= (optimal.square() * (1 + EXCESS) ** 2 + (2 * EPS * norm) ** 2).sqrt()


@pytest.mark.parametrize("rank", [10, 13])
def test_a_small_tail_is_as_accurate_as_that_of_an_svd(rank):
    w = matrix(spectrum("steep", 40), 40, 80).float()  # tails of 1e-2 and 2.5e-3: far below √ε·σ₁ in their squares
    assert residual_norm(w, left_basis(w, rank)) <= tail(w, rank) * (1 + EXCESS)


def test_columns_descend():
    w = torch.randn(3, 20, 30, dtype=torch.float64)
    energy = torch.linalg.norm(left_basis(w, 20).mT @ w, dim=-1)
    torch.testing.assert_close(energy, torch.linalg.svdvals(w), rtol=1e-10, atol=0)


def test_fast_path_for_a_plain_spectrum(methods):
    left_basis(matrix(spectrum("flat", 40), 40, 80).float(), 4)
    assert methods == [("eigh", torch.float32)]


def test_fallback_to_float64_for_a_small_tail(methods):
    left_basis(matrix(spectrum("cliff", 40), 40, 80).float(), 11)
    assert methods == [("eigh", torch.float32), ("eigh", torch.float64)]


def test_fallback_to_a_true_svd_for_a_tail_below_float64_grams(methods):
    left_basis(torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 80, dtype=torch.float64), 5)
    assert methods == [("eigh", torch.float64), ("svd", torch.float64)]


def test_one_bad_matrix_of_a_batch_is_enough_for_the_fallback():
    plain, steep = torch.randn(40, 80), matrix(10 ** -torch.arange(40, dtype=torch.float64), 40, 80).float()
    batch = torch.stack([plain, steep])
    excess = residual_norm(batch, left_basis(batch, 3)) / tail(batch, 3)
    assert excess.max() <= 1 + EXCESS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "planted", "rank"), [(30, 50, 4, 4), (30, 50, 4, 9), (50, 3, 3, 10), (8, 2, 1, 8)])
def test_planted_rank_is_reproduced_and_the_basis_complete(dtype, m, n, planted, rank):
    w = torch.randn(m, planted, dtype=dtype) @ torch.randn(planted, n, dtype=dtype)
    u = left_basis(w, rank)
    eps = torch.finfo(dtype).eps
    assert u.shape == (m, rank)
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=dtype), rtol=0, atol=20 * eps)
    assert residual_norm(w, u) <= 20 * eps * torch.linalg.norm(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_matrix_has_an_orthonormal_basis(dtype):
    u = left_basis(torch.zeros(2, 6, 9, dtype=dtype), 4)
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=dtype).expand(2, 4, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    # Squares of such values leave float32: the Gram matrix is all zeros or all Inf.
    w = matrix(spectrum("slow", 20), 20, 30)
    scaled = (w * scale).float()
    assert residual_norm(scaled.double() / scale, left_basis(scaled, 5)) <= tail(w, 5) * (1 + EXCESS)


def test_no_gradient_is_recorded():
    assert not basis.working(torch.randn(3, 3, requires_grad=True)).requires_grad
    assert basis.working(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert basis.working(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("rank", [1, 10])
def test_a_truncation_counts_as_accurate_down_to_the_tail_that_rounding_leaves(rank):
    limit = rank * 8 * torch.finfo(torch.float32).eps / 1e-4
    for tail, accurate in [(1.01 * limit, True), (0.99 * limit, False)]:
        values = torch.tensor([0.3 * tail, 0.7 * tail, *[1.0] * rank])
        assert _accurate(values, rank) == accurate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("entry", [3.0, -3.0, 0.25, -1.5e-3])
@pytest.mark.parametrize("strided", [False, True])
def test_a_magnitude_is_the_power_of_two_just_above_the_largest_entry(dtype, entry, strided):
    t = torch.zeros(4, 6, dtype=dtype)
    t[1, 2], t[3, 5] = entry, entry / 2
    found = magnitude(t.mT if strided else t)
    assert found / 2 <= abs(entry) < found
    assert math.frexp(found)[0] == 0.5
    assert magnitude(torch.zeros(2, 2, dtype=dtype)) == 1
