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
