"""Tucker-2 of a convolution weight: both channel modes are cut, the kernel stays (paper, eq. 4-6).

    W (S×C×k…) ≈ core (r2×r1×k…) ×_C first (r1×C) ×_S last (S×r2)

``first`` has orthonormal rows, ``last`` orthonormal columns. The start is the input basis of the plain higher-order
SVD. Half-steps of higher-order orthogonal iteration follow (De Lathauwer et al. 2000b): each basis is the best one
for the other, so the error never rises. After the first half-step it is that of the sequentially truncated HOSVD,
with ‖W − W'‖² ≤ tail²(C mode) + tail²(S mode).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxlrd.factor.basis import basis_of, magnitude, working
from fxlrd.factor.svd import relative_error


class Triple(NamedTuple):
    """A Tucker-2 form and its relative Frobenius error. The factor of a mode that is not cut is None."""

    first: Tensor | None
    core: Tensor
    last: Tensor | None
    error: float


def tucker2(weight: Tensor, rank_in: int | None, rank_out: int | None, sweeps: int = 1) -> Triple:
    """Return the Tucker-2 factors of ``weight`` (G, S, C, k…), a batch of G convolution weights.

    Shapes: first (G, r1, C), core (G, r2, r1, k…), last (G, S, r2). A rank of None leaves that mode
    uncut and without a factor (Tucker-1). Ranks lie in 1…C and 1…S. Computes in float32, or float64 for a float64
    weight.
    """
    w = working(weight)
    kernel = w.shape[3:]
    peak = magnitude(w)
    w = w.flatten(3) / peak  # G S C K; squares of its entries stay within range
    first = last = None
    if rank_in is not None:
        first = _input_basis(w, rank_in)
    if rank_out is not None:
        for _ in range(max(1, sweeps)):
            last = _output_basis(_cut_input(w, first), rank_out)
            if rank_in is not None:
                first = _input_basis(_cut_output(w, last), rank_in)
    core = _cut_output(_cut_input(w, first), last)
    approximation = core
    if first is not None:
        approximation = torch.einsum("gork,grc->gock", approximation, first)
    if last is not None:
        approximation = torch.einsum("gock,gso->gsck", approximation, last)
    return Triple(first, core.unflatten(3, kernel) * peak, last, relative_error(w, approximation))


def _input_basis(w: Tensor, rank: int) -> Tensor:
    return basis_of(w.transpose(1, 2).flatten(2), rank).mT


def _output_basis(w: Tensor, rank: int) -> Tensor:
    return basis_of(w.flatten(2), rank)


def _cut_input(w: Tensor, first: Tensor | None) -> Tensor:
    return w if first is None else torch.einsum("gsck,grc->gsrk", w, first)


def _cut_output(w: Tensor, last: Tensor | None) -> Tensor:
    return w if last is None else torch.einsum("gsck,gso->gock", w, last)
