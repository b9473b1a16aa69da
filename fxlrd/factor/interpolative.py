"""Interpolative decomposition of a tensor's channels from its second moments.

Retain r of C channels and rebuild the others linearly from them: X ≈ X[:, S]·Tᵀ, with T (C×r) least squares on
the second moments G = E[x·xᵀ] and T[S] the identity. The output of a consumer with weight W then differs by

    E‖W·(x − T·x[S])‖² = tr(A·R),   A = WᵀW,  R = G − G[:,S]·G[S,S]⁻¹·G[S,:]

Channels are picked greedily, each time the one that lowers this most: pivoted Cholesky on G, with the pivot j
that maximises (R·A·R)ⱼⱼ / Rⱼⱼ instead of Rⱼⱼ. With A = 1 this is column subset selection, of which the
column-pivoted QR is the cheap variant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ONE_BY_ONE = 1024
"""Up to this many channels, each pivot is chosen after the update by the one before, in float64. Above it, a block
of pivots is chosen at a time, in float32."""

_TINY = 1e-300


class Interpolation(NamedTuple):
    """The retained channels (ascending), T (C×r) with ``x ≈ T @ x[retained]``, and the predicted relative error."""

    retained: Tensor
    matrix: Tensor
    error: float


def interpolate(second: Tensor, rank: int, importance: Tensor | None = None) -> Interpolation:
    """Pick ``rank`` of the C channels with second moments ``second`` (C×C) and interpolate the others.

    ``importance`` is A = WᵀW (C×C) of the layers that read the channels, identity by default. Runs in float64. The
    error is sqrt(tr(A·R) / tr(A·G)), 0 where all channels are zero.
    """
    g = second.double()
    a = torch.eye(len(g), dtype=g.dtype, device=g.device) if importance is None else importance.double()
    retained = select(g, rank, a)
    matrix = least_squares(g, retained)
    return Interpolation(retained, matrix, residual(g, retained, matrix, a))


def select(second: Tensor, rank: int, importance: Tensor) -> Tensor:
    """Return ``rank`` channel indices, ascending, picked greedily (module docstring)."""
    return torch.tensor(sorted(greedy(second, rank, importance)), device=second.device)


def greedy(second: Tensor, rank: int, importance: Tensor) -> list[int]:
    """Return ``rank`` channel indices in the order of picking: those of a lower rank are the first of them."""
    count = len(second)
    wide = count > _ONE_BY_ONE
    # Scale matters to neither the order of the gains nor the weights; products stay within range.
    r, a = (m.double() / m.diagonal().max().clamp_min(_TINY) for m in (second, importance))
    r, a = (r.float(), a.float()) if wide else (r, a)
    q = a @ r  # A·R; then (R·A·R)ⱼⱼ is the sum of column j of R∘Q
    block = count // 64 if wide else 1
    negligible = 1e-6 if wide else 1e-12
    free = torch.ones(count, dtype=torch.bool, device=r.device)
    picked: list[int] = []
    while len(picked) < rank:
        variance = r.diagonal()
        alive = free & (variance > negligible)
        if not bool(alive.any()):
            # All others are linear functions of the picked channels: any of them will do.
            picked += torch.nonzero(free).flatten()[: rank - len(picked)].tolist()
            break
        gain = torch.where(alive, (r * q).sum(0).clamp_min(0) / variance.clamp_min(negligible), -1.0)
        pivots = _pivots(gain, r, min(block, rank - len(picked), int(alive.sum())))
        free[pivots] = False
        picked += pivots.tolist()
        rows = r[pivots]
        weights = torch.linalg.pinv(rows[:, pivots], hermitian=True) @ rows
        q -= q[:, pivots] @ weights
        r -= rows.mT @ weights
    return picked


def _pivots(gain: Tensor, r: Tensor, count: int) -> Tensor:
    """Return the best ``count`` pivots; each gain is scaled to the share of variance that earlier pivots leave."""
    if count == 1:
        return gain.argmax().view(1)
    candidates = gain.topk(min(4 * count, int((gain >= 0).sum()))).indices
    local, gains = r[candidates][:, candidates], gain[candidates]
    variance = local.diagonal().clone()
    chosen: list[int] = []
    for _ in range(count):
        remaining = gains * (local.diagonal() / variance).clamp_min(0)
        remaining[chosen] = -1.0
        j = int(remaining.argmax())
        chosen.append(j)
        local -= torch.outer(local[:, j], local[j]) / local[j, j].clamp_min(1e-6 * variance[j])
    return candidates[chosen]


def least_squares(second: Tensor, retained: Tensor, ridge: float = 0.0) -> Tensor:
    """Return T (C×r) = G[:,S]·G[S,S]⁺ with T[S] set to the exact identity.

    ``ridge``, relative to the mean variance, is added to the diagonal of G[S,S].
    """
    g = second.double()
    inner = g[retained][:, retained]
    inner = inner + torch.eye(len(retained), dtype=g.dtype, device=g.device) * (ridge * inner.diagonal().mean())
    scale = inner.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a dead channel
    inner = inner / torch.outer(scale, scale)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if not failed.item() and bool((factor.diagonal() > 1e-5).all()):
        matrix = torch.cholesky_solve(g[retained] / scale[:, None], factor).mT
    else:
        values, vectors = torch.linalg.eigh(inner)
        # A relative cut-off drops the directions that do not occur in the calibration inputs.
        inverse = torch.where(values > values[-1] * 1e-10, 1 / values.clamp_min(_TINY), 0.0)
        matrix = ((g[:, retained] / scale @ vectors) * inverse) @ vectors.mT
    matrix = matrix / scale
    matrix[retained] = torch.eye(len(retained), dtype=g.dtype, device=g.device)
    return matrix


def residual(second: Tensor, retained: Tensor, matrix: Tensor, importance: Tensor) -> float:
    """Return sqrt(tr(A·R) / tr(A·G)), R the second moments of x − T·x[S]."""
    total = (importance * second.double()).sum().item()
    return (lost(second, retained, matrix, importance) / total) ** 0.5 if total > 0 else 0.0


def lost(second: Tensor, retained: Tensor, matrix: Tensor, importance: Tensor) -> float:
    """Return tr(A·R), R the second moments of x − T·x[S]."""
    g = second.double()
    cross = matrix @ g[retained]
    r = g - cross - cross.mT + matrix @ g[retained][:, retained] @ matrix.mT
    return max((importance * r).sum().item(), 0.0)
