"""Products of a matrix with its own transpose, at little more than half the work: torch has no symmetric product.

And the way back, to what has a given product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8
_NARROW = 64
"""Columns of a block, at least: narrower products are slow."""


def gram(rows: Tensor) -> Tensor:
    """Return xᵀ·x (C×C) of the rows x (N×C): the upper half is multiplied out, some columns at a time, and mirrored."""
    width = rows.shape[1]
    step = max(_NARROW, -(-width // _BLOCKS))
    result = rows.new_empty(width, width)
    for start in range(0, width, step):
        end = min(start + step, width)
        block = rows[:, start:end].mT @ rows[:, start:]
        result[start:end, start:] = block
        result[end:, start:end] = block[:, end - start :].mT
    return result


def half(product: Tensor) -> Tensor:
    """Return x (C×C) with xᵀ·x = ``product`` (C×C), positive semidefinite but for rounding; in float64."""
    product = product.double()
    lower, failed = torch.linalg.cholesky_ex(product)
    if not failed.item():
        return lower.mT
    values, vectors = torch.linalg.eigh(product)
    return values.clamp_min(0).sqrt()[:, None] * vectors.mT
