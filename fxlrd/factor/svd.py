"""Truncated SVD of a matrix into two balanced factors (paper, eq. 1-3).

    W (S×C) ≈ last · first,   last = U√Σ (S×R),   first = √Σ Vᵀ (R×C)

Both factors carry √σ, so that their gradients stay of one size when they are fine-tuned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxlrd.factor.basis import basis_of, within_range, working

_ENTRIES = 2**22
"""Entries of a product that are in memory at once."""


class Pair(NamedTuple):
    """W ≈ last @ first, with the relative Frobenius error of that."""

    first: Tensor
    last: Tensor
    error: float


def svd(weight: Tensor, rank: int) -> Pair:
    """Return the best rank-``rank`` approximation of ``weight`` (…, S, C) as first (…, R, C), last (…, S, R).

    Leading dimensions are a batch. Computes and returns float32, or float64 for a float64 weight. ``rank`` must lie
    in 1…min(S, C).
    """
    w, peak = within_range(working(weight))
    if w.shape[-2] <= w.shape[-1]:
        left = basis_of(w, rank)
        right = left.mT @ w
        scale = right.norm(dim=-1, keepdim=True)
    else:
        right = basis_of(w.mT, rank).mT
        left = w @ right.mT
        scale = left.norm(dim=-2, keepdim=True).mT
    first, last = _balance(left, right, scale, split_left=w.shape[-2] > w.shape[-1])
    error = product_error(w, last, first)
    return Pair(first.mul_(peak**0.5), last.mul_(peak**0.5), error)


def _balance(left: Tensor, right: Tensor, scale: Tensor, split_left: bool) -> tuple[Tensor, Tensor]:
    """Return (first, last), with √σ moved from the factor that carries σ (``left`` if split_left) to the other.

    ``scale`` (…, R, 1) holds σ. Directions where σ is zero stay zero in the factor that carried it. In place: the
    factors may be as large as the weight.
    """
    root = scale.sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    if split_left:
        return right.mul_(root), left.mul_(inverse.mT)
    return right.mul_(inverse), left.mul_(root.mT)


def product_error(reference: Tensor, last: Tensor, first: Tensor) -> float:
    """Return the `relative_error` of last @ first, some rows at a time: the product is as large as the weight."""
    norm, rows = torch.linalg.vector_norm, max(1, _ENTRIES // reference.shape[-1])
    blocks = zip(reference.split(rows, -2), last.split(rows, -2), strict=True)
    difference = math.hypot(*(norm(block - part @ first).item() for block, part in blocks))
    size = norm(reference).item()
    return difference / size if size else difference


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """Return ‖reference − approximation‖ / ‖reference‖ (Frobenius); 0 for two zero tensors."""
    norm = torch.linalg.vector_norm(reference).item()
    difference = torch.linalg.vector_norm(reference - approximation).item()
    return difference / norm if norm else difference
