"""Products of a matrix with its own transpose, at little more than half the work: torch has no symmetric product.

And the way back, to what has a given product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxlrd.factor.failures import check_finite

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


def add_gram(total: Tensor, rows: Tensor, scale: float = 1.0, sums: Tensor | None = None) -> None:
    """Add ``scale``·xᵀ·x of the rows x (N×C) to ``total`` (C×C), symmetric, in place and in its precision.

    The upper half is multiplied out, some columns at a time, and mirrored. Of the rows themselves ``scale``·Σx is added
    to ``sums`` (C).
    """
    width = len(total)
    step = max(_NARROW, -(-width // _BLOCKS))
    for some in rows.split(max(_SHORT, _ENTRIES // max(width, 1))):
        part = some.to(total.dtype)
        if sums is not None:
            sums.add_(part.sum(0), alpha=scale)
        for start in range(0, width, step):
            block = slice(start, start + step)
            total[block, start:].addmm_(part[:, block].mT, part[:, start:], alpha=scale)
    for start in range(0, width, step):
        end = start + step
        total[end:, start:end] = total[start:end, end:].mT


def half(product: Tensor) -> Tensor:
    """Return x (C×C) with xᵀ·x = ``product`` (C×C), positive semidefinite but for rounding; in float64."""
    product = product.double()
    check_finite(product)
    scale = product.diagonal().clamp_min(0).sqrt()
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    unit = product / torch.outer(divisor, divisor)  # so that each entry is as exact as its row and column
    unit.diagonal().fill_(1)
    lower, failed = torch.linalg.cholesky_ex(unit)
    if not failed.item():
        return lower.mT * scale
    values, vectors = torch.linalg.eigh(unit)
    return values.clamp_min(0).sqrt()[:, None] * vectors.mT * scale
