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
_RANGE = 30
"""Sums in units within this power of two of 1 are within the range of float32."""


@dataclass
class Samples:
    """The sum of Γᵢ (S×S) over samples, that of ‖Γᵢ‖², and the number of samples.

    Gradients are in units of ``unit``, a power of two above the largest one so far: their squares stay within range.
    Sums are in the precision of the gradients, float32 of a float32 model. That is enough for an estimate, to which a
    share of its mean is added wherever it is used; and those of wide layers take as much memory as the model itself.
    """

    total: Tensor
    squares: float = 0.0
    count: int = 0
    unit: float = 0.0

    @classmethod
    def none(cls, like: Tensor, width: int) -> Samples:
        """Return the sum of no samples of gradients ``like`` these, of so many outputs."""
        return cls(working(like[:0]).new_zeros(width, width))

    def add(self, rows: Tensor, unit: float = 1.0) -> None:
        """Add samples: gradients (n, positions, S) in a unit, of which at most `POSITIONS` a sample, in place of all.

        On a CPU their products are in float32, which is exact enough for what is an estimate, and half the work.
        """
        most = POSITIONS if len(self.total) <= WIDE else POSITIONS // 4
        stride = math.ceil(rows.shape[1] / most)
        first = self.count % stride
        positions, rows = rows.shape[1], rows[:, first::stride].contiguous()
        self.count += len(rows)
        if not bool(rows.any()):
            return
        peak = magnitude(rows)  # squares of small gradients stay within range
        whole = peak * unit
        if whole > self.unit:
            less = (self.unit / whole) ** 2
            self.total, self.squares, self.unit = self.total.mul_(less), self.squares * less**2, whole
        rows = (working(rows) if rows.device.type == "cpu" else rows.double()) / peak
        scale = (whole / self.unit) ** 2 * positions / max(rows.shape[1], 1)
        self.total.add_(gram(rows.flatten(0, 1)).to(self.total.dtype), alpha=scale)
        small = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
        self.squares += float(torch.linalg.vector_norm(small, dtype=torch.float64)) ** 2 * scale**2

    def sum(self) -> Tensor:
        """Return Σ Γᵢ."""
        return self._in_units(self.total.clone())

    def shrunk(self) -> Tensor:
        """Return Σ Γᵢ shrunk by the share of noise (module docstring); its trace stays."""
        width, size = len(self.total), float(torch.linalg.vector_norm(self.total, dtype=torch.float64)) ** 2
        mean = float(self.total.diagonal().double().mean())
        deviation = size - width * mean**2
        noise = self.squares - size / max(self.count, 1)
        rho = min(1.0, max(0.0, noise) / deviation) if deviation > 0 else 0.0
        shrunk = (1 - rho) * self.total
        shrunk.diagonal().add_(rho * mean)
        return self._in_units(shrunk)

    def _in_units(self, total: Tensor) -> Tensor:
        """Return a sum times ``unit``², in float64 where float32 might not hold that."""
        within = 2.0**-_RANGE <= self.unit <= 2.0**_RANGE
        return (total if within else total.double()).mul_(self.unit**2)


class Elsewhere(Samples):
    """Those of a call that another process adds up."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(()))

    def add(self, rows: Tensor, unit: float = 1.0) -> None:
        """Do nothing."""
