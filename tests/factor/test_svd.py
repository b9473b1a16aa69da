from __future__ import annotations

import pytest
import torch

from fxlrd.factor.basis import EXCESS
from fxlrd.factor.svd import product_error, relative_error, svd
from tests.support.factors import svd_product

SHAPES = [(12, 30), (30, 12), (20, 20), (3, 12, 30), (3, 30, 12), (1, 1), (1, 40), (40, 1)]


def optimal(weight, rank):
    values = torch.linalg.svdvals(weight.double())
    return (values[..., rank:].square().sum() / values.square().sum()).sqrt().item()


def actual(weight, pair):
    return relative_error(weight.double(), svd_product(pair))


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_error_is_the_truncated_tail(shape):
    w = torch.randn(shape, dtype=torch.float64)
    for rank in range(1, min(shape[-2:])):
        pair = svd(w, rank)
        assert pair.first.shape == (*shape[:-2], rank, shape[-1])
        assert pair.last.shape == (*shape[:-1], rank)
        assert (pair.first.dtype, pair.last.dtype) == (torch.float64, torch.float64)
        assert pair.error == pytest.approx(optimal(w, rank), rel=1e-10)
        assert actual(w, pair) == pytest.approx(pair.error, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape):
    w = torch.randn(shape, dtype=torch.float64)
    pair = svd(w, min(shape[-2:]))
    torch.testing.assert_close(pair.last @ pair.first, w, rtol=0, atol=1e-12)
    assert pair.error < 1e-12


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 24, 24)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_float32_error_is_within_the_excess_of_the_optimal_one(shape, decay):
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    w = (u * (s * 10 ** (-decay * torch.arange(s.shape[-1]) / 5)).unsqueeze(-2) @ v).float()
    ranks = [r for r in range(1, min(shape[-2:])) if optimal(w, r) > 3e-5]  # below it float32 factors cannot hold it
    assert len(ranks) >= 4
    for rank in ranks:
        pair = svd(w, rank)
        assert pair.first.dtype == pair.last.dtype == torch.float32
        assert actual(w, pair) <= optimal(w, rank) * (1 + EXCESS)
        assert pair.error == pytest.approx(actual(w, pair), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_factored_in_float32(dtype):
    w = torch.randn(20, 30).to(dtype)
    pair = svd(w, 5)
    assert pair.first.dtype == pair.last.dtype == torch.float32
    assert actual(w, pair) <= optimal(w, 5) * (1 + EXCESS)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_balanced_and_descend(shape):
    w = torch.randn(shape, dtype=torch.float64)
    rank = max(1, min(shape[-2:]) // 2)
    pair = svd(w, rank)
    rows, columns = pair.first.norm(dim=-1), pair.last.norm(dim=-2)
    torch.testing.assert_close(rows, columns, rtol=1e-10, atol=0)
    torch.testing.assert_close(rows.square(), torch.linalg.svdvals(w)[..., :rank], rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [4, 7])
def test_planted_rank_is_reproduced(shape, dtype, rank):
    w = torch.randn(shape[0], 4, dtype=dtype) @ torch.randn(4, shape[1], dtype=dtype)
    pair = svd(w, rank)
    assert pair.error <= 10 * torch.finfo(dtype).eps
    assert pair.first.isfinite().all()
    assert pair.last.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_matrix(shape, dtype):
    pair = svd(torch.zeros(shape, dtype=dtype), 3)
    assert pair.error == 0
    torch.testing.assert_close(pair.last @ pair.first, torch.zeros(shape, dtype=dtype), rtol=0, atol=0)


def test_a_zero_matrix_within_a_batch():
    w = torch.stack([torch.zeros(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)])
    pair = svd(w, 3)
    assert pair.error == pytest.approx(optimal(w, 3), rel=1e-10)
    assert (pair.last @ pair.first)[0].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_the_scale_of_the_weight_does_not_matter(scale, shape):
    w = torch.randn(shape, dtype=torch.float64)
    pair = svd((w * scale).float(), 5)
    assert relative_error(w, svd_product(pair) / scale) <= optimal(w, 5) * (1 + EXCESS)
    assert pair.error == pytest.approx(optimal(w, 5), rel=1e-3)


def test_relative_error():
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(a, torch.zeros(2)) == 1
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.zeros(2), a) == 5


def test_the_error_of_a_product_is_that_of_all_its_rows(monkeypatch):
    weight, last, first = torch.randn(2, 9, 5), torch.randn(2, 9, 3), torch.randn(2, 3, 5)
    monkeypatch.setattr("fxlrd.factor.svd._ENTRIES", 20)
    assert product_error(weight, last, first) == pytest.approx(relative_error(weight, last @ first), rel=1e-6)
    assert product_error(0 * weight, 0 * last, first) == 0
