from __future__ import annotations

import pytest
import torch

from fxlrd.factor.products import gram


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (40, 64), (7, 130), (30, 515), (9, 700)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_gram_matrix_is_the_product(shape, strided):
    x = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(0)).double().mT
    x = x if strided else x.contiguous()
    torch.testing.assert_close(gram(x), x.mT @ x, rtol=1e-12, atol=1e-12)
