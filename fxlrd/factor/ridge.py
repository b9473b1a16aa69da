"""How much to regularise moments of few samples: by how well channels predict each other where they were not fitted.

With the covariance G of n positions of C channels, one half S of the channels predicts the other half R by

    x_R ≈ G_RS·(G_SS + ρ·diag G_SS)⁻¹·x_S

Factors and interpolations of layers rely on such relations between channels. The ρ is taken that predicts other
positions best: the squared error relative to each channel's variance, summed over R, with the halves in both roles.
Data of exactly low rank have it at 0 as soon as there are more positions than the rank; a Gaussian of full rank has it
at about C/n.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""The shares tried, of each channel's variance."""

_START = 6
"""Where in the grid the search begins."""

_ROUNDING = 1e-7
"""Least share: below it, the noise of rounding is what is fitted."""

_NOTHING = 1e-6
"""Relative squared error below which the one half of the channels determines the other."""


def best_ridge(covariance: Tensor, held_out: Tensor) -> float:
    """Return ρ, of `GRID`, that predicts ``held_out`` best: the second moments (C×C) of other positions.

    Both are about the mean of the positions that ``covariance`` (C×C) is of. The search goes downhill on the grid.
    Runs in float64.
    """
    covariance, held_out = covariance.double(), held_out.double()
    scale = (covariance + held_out).diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a channel that is always the same
    fitted, others = (moments / torch.outer(scale, scale) for moments in (covariance, held_out))
    halves = torch.arange(0, len(scale), 2), torch.arange(1, len(scale), 2)
    errors: dict[int, float] = {}

    def error(i: int) -> float:
        if i not in errors:
            errors[i] = sum(
                _prediction_error(fitted, others, reads, made, max(GRID[i], _ROUNDING))
                for reads, made in (halves, halves[::-1])
            )
        return errors[i]

    at = _START
    for step in (-1, 1):
        while 0 <= at + step < len(GRID) and error(at + step) < error(at):
            at += step
    return 0.0 if error(at) < _NOTHING * len(scale) else GRID[at]


def _prediction_error(fitted: Tensor, others: Tensor, reads: Tensor, made: Tensor, ridge: float) -> float:
    """Return the squared error, on ``others``, of the channels ``made`` predicted from those in ``reads``."""
    inner = fitted[reads][:, reads] + ridge * torch.eye(len(reads)).to(fitted)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed.item():
        return torch.inf
    weights = torch.cholesky_solve(fitted[reads][:, made], factor)  # reads × made
    cross, carried = others[reads][:, made], others[reads][:, reads] @ weights
    return float(others[made, made].sum() - 2 * (weights * cross).sum() + (weights * carried).sum())


def with_ridge(moments: Tensor, ridge: float) -> Tensor:
    """Return moments (C×C) shrunk towards their diagonal: with ``ridge`` times that added, to the same variances."""
    return (moments + ridge * moments.diagonal().diag()) / (1 + ridge)
