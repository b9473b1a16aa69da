"""Inputs for tests, and comparisons of outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def images(batch: int = 2, size: int = 9, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal noise of shape (batch, channels, size, size)."""
    return torch.randn(batch, channels, size, size).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Check shape and dtype, then values to 1e-9: the tolerance of a claim that is exact in float64."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖."""
    return ((actual - expected).norm() / expected.norm()).item()


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and, bit for bit, the same values."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
