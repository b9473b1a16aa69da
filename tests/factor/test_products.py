from __future__ import annotations

import pytest
import torch

from fxlrd.factor.products import add_gram, gram, half


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (40, 64), (7, 130), (30, 515), (9, 700)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_gram_matrix_is_the_product(shape, strided):
    x = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(0)).double().mT
    x = x if strided else x.contiguous()
    torch.testing.assert_close(gram(x), x.mT @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1500, 515), (3000, 70), (2, 3)])
def test_it_is_added_in_the_precision_of_the_sum(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    total = gram(x.double())
    add_gram(total, x, -0.25)
    torch.testing.assert_close(total, 0.75 * (x.double().mT @ x.double()), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(total, total.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 7, 20])
def test_half_of_a_product_gives_it_again(rank):
    product = gram(torch.randn(rank, 20, generator=torch.Generator().manual_seed(0)).double())
    made = half(product)
    torch.testing.assert_close(made.mT @ made, product, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 6, 40])
def test_half_of_a_product_is_as_exact_in_small_rows_and_nothing_in_those_that_are_zero(rank):
    rows = torch.randn(rank, 6, generator=torch.Generator().manual_seed(0)).double()
    rows = rows * torch.tensor([1e6, 1.0, 0.0, 1e-6, 1.0, 1e3])
    made = half(rows.mT @ rows)
    torch.testing.assert_close(made.mT @ made, rows.mT @ rows, rtol=1e-9, atol=0)
    assert not made[:, 2].any()


def test_sums_are_those_of_the_rows_and_can_be_taken_back():
    x = torch.randn(3000, 300, generator=torch.Generator().manual_seed(0)).half()
    total, sums = torch.zeros(300, 300).double(), torch.zeros(300).double()
    add_gram(total, x, sums=sums)
    torch.testing.assert_close(sums, x.double().sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, x.double().mT @ x.double(), rtol=1e-12, atol=1e-11)
    add_gram(total, x, -1, sums)
    assert max(total.abs().max(), sums.abs().max()) < 1e-10
