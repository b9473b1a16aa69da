"""Interpolative decomposition of a tensor's channels from its second moments.

Retain r of C channels and rebuild the others linearly from them: x ≈ T·x[S], with T (C×r) least squares on the second
moments G = E[x·xᵀ] and T[S] the identity. With a constant to add, x ≈ T·x[S] + t, G is the covariance and
t = E[x] − T·E[x[S]]. The output of a consumer with weight W, where Γ weighs outputs and F = Γ^½·W, then differs by

    E‖F·(x − T·x[S] − t)‖² = tr(D·G·Dᵀ),   D·x = F·(x − T·x[S])

Which channels to retain is in fxlrd/factor/elimination.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-300


class Interpolation(NamedTuple):
    """How x is rebuilt from the retained channels, ``x ≈ matrix @ x[retained] + shift``, and the relative error.

    ``matrix`` is T (C×r), ``shift`` t (C) or None for no constant, ``error`` the predicted
    sqrt(tr(D·G·Dᵀ) / tr(F·G·Fᵀ)).
    """

    matrix: Tensor
    shift: Tensor | None
    error: float


def interpolate(
    second: Tensor, retained: Tensor, weight: Tensor, ridge: float = 0.0, mean: Tensor | None = None
) -> Interpolation:
    """Return the interpolation of C channels from those ``retained`` (ascending). Runs in float64.

    ``second`` (C×C) are the second moments; with ``mean`` (C) the covariance, and then a constant is added.
    ``weight`` is F (m×C) of the layer that reads the channels. ``ridge`` is that of `least_squares`.
    """
    matrix, shift = reconstruction(second, retained, ridge, mean)
    return Interpolation(matrix, shift, residual(second, retained, matrix, weight))


def reconstruction(
    second: Tensor, retained: Tensor, ridge: float = 0.0, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return T and t of `interpolate`."""
    matrix = least_squares(second, retained, ridge)
    return matrix, None if mean is None else mean.double() - matrix @ mean.double()[retained]


def least_squares(second: Tensor, retained: Tensor, ridge: float = 0.0) -> Tensor:
    """Return T (C×r) = G[:,S]·G[S,S]⁺ with T[S] set to the exact identity.

    ``ridge`` is a share of each channel's variance, which is added to it in G[S,S].
    """
    g = second.double()
    inner = g[retained][:, retained]
    scale = inner.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a dead channel
    inner = inner / torch.outer(scale, scale) + ridge * torch.eye(len(retained), dtype=g.dtype, device=g.device)
    others = _others(retained, len(g))
    cross = g[others][:, retained] / scale
    factor, failed = torch.linalg.cholesky_ex(inner)
    if not failed.item() and bool((factor.diagonal() > 1e-5).all()):
        rebuilt = torch.cholesky_solve(cross.mT, factor).mT
    else:
        values, vectors = torch.linalg.eigh(inner)
        # A relative cut-off drops the directions that do not occur in the calibration inputs.
        inverse = torch.where(values > values[-1] * 1e-10, 1 / values.clamp_min(_TINY), 0.0)
        rebuilt = ((cross @ vectors) * inverse) @ vectors.mT
    matrix = g.new_zeros(len(g), len(retained))
    matrix[retained] = torch.eye(len(retained), dtype=g.dtype, device=g.device)
    matrix[others] = rebuilt / scale
    return matrix


def _others(retained: Tensor, count: int) -> Tensor:
    """Return the channels, of so many, that are not retained."""
    dropped = torch.ones(count, dtype=torch.bool, device=retained.device)
    dropped[retained] = False
    return dropped.nonzero().flatten()


def residual(second: Tensor, retained: Tensor, matrix: Tensor, weight: Tensor) -> float:
    """Return sqrt(tr(D·G·Dᵀ) / tr(F·G·Fᵀ)), where T[S] is the identity."""
    made, missing = _energies(second, retained, matrix, weight)
    return (missing / made) ** 0.5 if made > 0 else 0.0


def lost(second: Tensor, retained: Tensor, matrix: Tensor, weight: Tensor) -> float:
    """Return tr(D·G·Dᵀ), where T[S] is the identity."""
    return _energies(second, retained, matrix, weight)[1]


def _energies(second: Tensor, retained: Tensor, matrix: Tensor, weight: Tensor) -> tuple[float, float]:
    """Return tr(F·G·Fᵀ) and tr(D·G·Dᵀ)."""
    g, f, others = second.double(), weight.double(), _others(retained, len(second))
    taken_over = f[:, others] @ matrix[others]
    difference = f.clone()
    difference[:, retained] = -taken_over
    by_f = f @ g
    by_difference = by_f - (f[:, retained] + taken_over) @ g[retained]
    return (by_f * f).sum().item(), max((by_difference * difference).sum().item(), 0.0)
