"""Samples of how much each direction of a layer's output matters, and what they say of all inputs.

Few inputs cover few directions: 256 inputs give a classifier of 1,000 classes 256 gradients, which leave three quarters
of the directions without a sample, and a fit would put its errors there. So Γ (fxlrd/calibration/importance.py) is
shrunk towards a multiple of I, by the share ρ of its deviation from that which is noise (Ledoit and Wolf, A
well-conditioned estimator for large-dimensional covariance matrices, 2004). One input with one draw of signs is a
sample Γᵢ of n:

    ρ = (1/n²)·Σᵢ‖Γᵢ − Γ̄‖² / ‖Γ̄ − μ·I‖²,   μ = tr Γ̄ / S
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxlrd.factor.basis import magnitude, working
from fxlrd.factor.products import gram

POSITIONS = 256
"""Positions of one input that are sampled, evenly strided; the next inputs begin at others."""
WIDE = 1024
"""Layers with more outputs than this are sampled at a quarter of the positions, at the cost of others."""


@dataclass
class Samples:
    """The sum of Γᵢ (S×S, float64) over samples, that of ‖Γᵢ‖², and the number of samples."""

    total: Tensor
    squares: float = 0.0
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Add samples: gradients (n, positions, S), of which at most `POSITIONS` a sample, in place of all others.

        On a CPU their products are in float32, which is exact enough for what is an estimate, and half the work.
        """
        most = POSITIONS if len(self.total) <= WIDE else POSITIONS // 4
        stride = math.ceil(rows.shape[1] / most)
        first = self.count % stride
        positions, rows = rows.shape[1], rows[:, first::stride]
        peak = magnitude(rows) if rows.numel() else 1.0  # squares of small gradients stay within range
        rows = (working(rows) if rows.device.type == "cpu" else rows.double()) / peak
        scale = peak**2 * positions / max(rows.shape[1], 1)
        self.total.add_(gram(rows.flatten(0, 1)), alpha=scale)
        small = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
        self.squares += float(small.double().square().sum()) * scale**2
        self.count += len(rows)

    def shrunk(self) -> Tensor:
        """Return Σ Γᵢ shrunk by the share of noise (module docstring); its trace stays."""
        mean, size = self.total.diagonal().mean(), float(self.total.square().sum())
        centred = self.total.clone()
        centred.diagonal().sub_(mean)
        deviation = float(centred.square().sum())
        noise = self.squares - size / max(self.count, 1)
        rho = min(1.0, max(0.0, noise) / deviation) if deviation > 0 else 0.0
        shrunk = (1 - rho) * self.total
        shrunk.diagonal().add_(rho * mean)
        return shrunk


class Elsewhere(Samples):
    """Those of a call that another process adds up."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """Do nothing."""
