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

_ENOUGH = 256
"""Positions held out that are looked at, at least; more where there are more than four times as many channels."""

_PREDICTED = 256
"""Channels of a half that are predicted, at most: the error of some says which share is best."""

_NOTHING = 1e-6
"""Relative squared error below which the one half of the channels determines the other."""


def best_ridge(covariance: Tensor, held_out: Tensor) -> float:
    """Return ρ, of `GRID`, that predicts ``held_out`` best: other positions (N×C), about the mean of the fitted ones.

    ``covariance`` (C×C) is that of the positions to fit to. Of many held out, some say enough. The search goes downhill
    on the grid. Runs in float64.
    """
    width = len(covariance)
    others = held_out[:: max(1, len(held_out) // max(_ENOUGH, width // 4))].double()
    scale = (covariance.double().diagonal() + others.square().mean(0)).clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a channel that is always the same
    fitted, others = covariance.double() / torch.outer(scale, scale), others / scale
    halves = [_Half(fitted, others, slice(i, None, 2), slice(1 - i, None, 2)) for i in (0, 1)]
    errors: dict[int, float] = {}

    def error(i: int) -> float:
        if i not in errors:
            errors[i] = sum(half.error(max(GRID[i], _ROUNDING)) for half in halves)
        return errors[i]

    at = _START
    for step in (-1, 1):
        while 0 <= at + step < len(GRID) and error(at + step) < error(at):
            at += step
    return 0.0 if error(at) < _NOTHING * width else GRID[at]


class _Half:
    """Half of the channels, ``made``, as predicted from the other half, ``reads``."""

    def __init__(self, fitted: Tensor, others: Tensor, reads: slice, made: slice) -> None:
        wanted, cross = others[:, made], fitted[reads, made]
        some = slice(None, None, max(1, -(-wanted.shape[1] // _PREDICTED)))
        self.inner, self.cross = fitted[reads, reads].contiguous(), cross[:, some]
        self.given, self.wanted = others[:, reads], wanted[:, some]
        self.weight = wanted.shape[1] / max(1, self.wanted.shape[1])

    def error(self, ridge: float) -> float:
        """Return the mean squared error of the positions held out, summed over the channels, or over as many."""
        inner = self.inner.clone()
        inner.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if failed.item():
            return torch.inf
        predicted = self.given @ torch.cholesky_solve(self.cross, factor)
        return float((self.wanted - predicted).square().mean(0).sum()) * self.weight


def with_ridge(moments: Tensor, ridge: float) -> Tensor:
    """Return moments (C×C) shrunk towards their diagonal: with ``ridge`` times that added, to the same variances."""
    if not ridge:
        return moments
    shrunk = moments / (1 + ridge)
    shrunk.diagonal().copy_(moments.diagonal())
    return shrunk
