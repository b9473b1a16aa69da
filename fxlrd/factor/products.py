"""Products of a matrix with its own transpose, at little more than half the work: torch has no symmetric product.

And the way back, to what has a given product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8
_NARROW = 64
"""Columns of a block, at least: narrower products are slow."""
_ENTRIES, _SHORT = 2**19, 256
"""Entries that are converted at once, which stay in a cache, and rows at least: shorter products are slow."""


def gram(rows: Tensor) -> Tensor:
    """Return xᵀ·x (C×C) of the rows x (N×C)."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_gram(total, rows)
    return total


def add_gram(total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Add ``scale``·xᵀ·x of the rows x (N×C) to ``total`` (C×C), symmetric, in place and in its precision.

    The upper half is multiplied out, some columns at a time, and mirrored.
    """
    width = len(total)
    step = max(_NARROW, -(-width // _BLOCKS))
    for some in rows.split(max(_SHORT, _ENTRIES // max(width, 1))):
        part = some.to(total.dtype)
        for start in range(0, width, step):
            block = slice(start, start + step)
            total[block, start:].addmm_(part[:, block].mT, part[:, start:], alpha=scale)
    for start in range(0, width, step):
        end = start + step
        total[end:, start:end] = total[start:end, end:].mT


def half(product: Tensor) -> Tensor:
    """Return x (C×C) with xᵀ·x = ``product`` (C×C), positive semidefinite but for rounding; in float64."""
    product = product.double()
    lower, failed = torch.linalg.cholesky_ex(product)
    if not failed.item():
        return lower.mT
    values, vectors = torch.linalg.eigh(product)
    return values.clamp_min(0).sqrt()[:, None] * vectors.mT
