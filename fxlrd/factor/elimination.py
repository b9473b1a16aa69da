"""Which units of a layer to drop first, and what that costs: backward elimination on their second moments.

A consumer with weight W reads C units h with moments G = E[h·hᵀ]; Γ weighs its outputs, so that F = Γ^½·W stands for
both. With the inverse P = G⁻¹, the best linear reconstruction of units R from the others S, and the error that dropping
R then makes, are

    h_R ≈ −P_RR⁻¹·P_RS·h_S,        E‖ΔF·h‖² = tr(A_RR·P_RR⁻¹),    A = FᵀF = WᵀΓW

so that the unit j of the least A_jj / P_jj is dropped. The others take over what it carried, and P is that of those:

    F_S ← F_S − F_R·P_RR⁻¹·P_RS        P_SS ← P_SS − P_SR·P_RR⁻¹·P_RS

One inverse therefore gives all numbers of units: those that few units lack are those that more lack, and some others
(Optimal Brain Surgeon, Hassibi and Stork 1993, on the units of a layer). For several consumers the errors add up. A
consumer whose bias is refitted has the covariance for G: that is the inverse of G bordered by a constant, without its
border.

Beside picking units one by one instead (pivoted Cholesky, weighted by A, with the same least squares), in relative
errors on inputs that were not fitted to. MLPs: of their outputs, where 75, 50 and 25 % of the units are retained;
SmolLM2-135M has 2.3 positions per unit, MiniLM 7. The network on Fashion-MNIST that ships with fxlrd: of the logits,
where `merge` has α = 1.5, 2.75 and 4 (BatchNorm statistics re-estimated).

                                  picked                  dropped                 dropped, with a ridge (ρ)
    SmolLM2, block 0           .243   .425   .515      .303   .471   .515      .184   .305   .464   (0.3)
    SmolLM2, block 8           .383   .540   .671      .384   .540   .669      .313   .472   .628   (0.3)
    SmolLM2, block 22          .309   .460   .605      .311   .462   .600      .273   .426   .575   (0.3)
    MiniLM, block 2            .069   .119   .171      .066   .116   .167      .066   .116   .167   (0.01)
    MiniLM, block 5            .039   .064   .093      .039   .063   .091      .038   .062   .090   (0.01)
    Fashion-MNIST              .107   .191   .290      .105   .179   .264

How the units are found matters less than that G is shrunk where positions are few (fxlrd/factor/ridge.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fxlrd.factor.products import gram, half

Array = np.ndarray[Any, np.dtype[np.float64]]
_TINY = float(np.finfo(np.float64).tiny)

_BLOCKS = 48
"""Units are dropped in so many blocks: within one the order is found among candidates, all else is updated after it."""

_CANDIDATES = 4
"""Candidates for a block, as a multiple of its size."""

_SINGULAR = 1e-14
"""Share of the sum of all variances that is added to each where the moments are singular: beyond their rounding."""

_INFLATION = 1e4
"""P is inverted anew where the largest variance inflation (diagonal of P, unit variances) has fallen by this factor."""


_FILLED = 0.8
"""Dropped units leave the matrices where fewer than this share of their units is left."""


class Reading(NamedTuple):
    """What a consumer reads: the units' second moments or covariance G (C×C), F (m×C) with FᵀF = WᵀΓW, and the ridge.

    With a ``ridge`` ρ, G is (G + ρ·diag G) / (1 + ρ).
    """

    second: Tensor
    weight: Tensor
    ridge: float = 0.0


class Elimination(NamedTuple):
    """Units in the order in which they are dropped, and the error after each.

    ``errors[d]`` is tr(F·R·Fᵀ), summed over the consumers, with the first d units dropped and R the moments of what the
    others do not explain: those of the moments with a ridge, by which a fit to few samples expects more.
    """

    units: int
    dropped: Tensor
    errors: Tensor

    def retained(self, count: int) -> Tensor:
        """Return the ``count`` units that are dropped last, ascending."""
        mask = torch.ones(self.units, dtype=torch.bool, device=self.dropped.device)
        mask[self.dropped[: self.units - count]] = False
        return mask.nonzero().flatten()

    def error(self, count: int) -> float:
        """Return the error where ``count`` units are retained."""
        return float(self.errors[self.units - count])


def eliminate(readings: Sequence[Reading], fewest: int = 0) -> Elimination:
    """Drop units until ``fewest`` are left, each time the one whose loss costs the consumers least. Runs in float64.

    Units that carry nothing (always zero, or read by nobody) and units that others determine are dropped first, at no
    error. Equal costs are decided by the lower index.
    """
    consumers = [_Consumer(reading) for reading in readings]
    count = len(consumers[0].precision)
    units = torch.arange(count, device=consumers[0].precision.device)  # by their place in the consumers' matrices
    free = torch.ones_like(units, dtype=torch.bool)
    dropped, losses, remaining = [units[:0]], [0.0], count
    while remaining > fewest:
        block, lost = _block(consumers, free, min(max(1, count // _BLOCKS), remaining - fewest))
        dropped.append(units[block])
        losses += lost
        free[block] = False
        remaining -= len(block)
        for consumer in consumers:
            consumer.drop(block)
        if remaining < _FILLED * len(units):
            places = free.nonzero().flatten()
            units, free = units[places], free[places]
            for consumer in consumers:
                consumer.move(places)
        for consumer in consumers:
            consumer.invert_anew(free)
    return Elimination(count, torch.cat(dropped), torch.tensor(losses, dtype=torch.float64).cumsum(0))


class _Consumer:
    """The state of one consumer, for units of unit variance: P and F, with zeros where units were dropped."""

    def __init__(self, reading: Reading) -> None:
        second = reading.second.double()
        scale = second.diagonal().clamp_min(0).sqrt()
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a unit that is always zero
        self.moments = second / torch.outer(divisor, divisor)
        self.moments /= 1 + reading.ridge
        self.moments.diagonal().fill_(1)
        weight = reading.weight.double() * scale
        self.weight = weight if len(weight) <= len(second) else half(gram(weight))
        self.units = torch.arange(len(second), device=second.device)
        self.precision = _inverse(self.moments)
        self.inflation = self._inflation()

    def drop(self, dropped: Tensor) -> None:
        """Let the other units take over from the dropped ones."""
        p, f = self.precision, self.weight
        rows = p[dropped]
        weights = torch.linalg.solve(rows[:, dropped], rows)
        f.addmm_(f[:, dropped], weights, alpha=-1).index_fill_(1, dropped, 0)
        p.addmm_(rows.mT, weights, alpha=-1).index_fill_(0, dropped, 0).index_fill_(1, dropped, 0)

    def move(self, places: Tensor) -> None:
        """Let go of all but the units at these places."""
        self.units = self.units[places]
        self.precision, self.weight = _part(self.precision, places), self.weight[:, places]

    def invert_anew(self, free: Tensor) -> None:
        """Invert the moments of the units that are left anew where that makes P more exact: see `_INFLATION`."""
        if not bool(free.any()) or self._inflation() * _INFLATION >= self.inflation:
            return
        places = free.nonzero().flatten()
        units = self.units[places]
        self.precision[places[:, None], places] = _inverse(_part(self.moments, units))
        self.inflation = self._inflation()

    def costs(self) -> Tensor:
        """Return A_jj / P_jj of each unit."""
        return self.weight.square().sum(0) / self.precision.diagonal().clamp_min(_TINY)

    def among(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return P and A of some units."""
        weight = self.weight[:, units]
        return _part(self.precision, units), weight.mT @ weight

    def _inflation(self) -> float:
        return float(self.precision.diagonal().max())


def _part(matrix: Tensor, units: Tensor) -> Tensor:
    return matrix[units[:, None], units]


def _inverse(moments: Tensor) -> Tensor:
    """Return the inverse for units of unit variance; of slightly larger variances where it has none."""
    least = _SINGULAR * len(moments)
    factor, failed = torch.linalg.cholesky_ex(moments)
    if not failed.item() and float(factor.diagonal().min()) ** 2 >= least:
        return torch.cholesky_inverse(factor)
    for added in (least, 1e3 * least, 1e6 * least):  # more than the least where the moments are not exact themselves
        factor, failed = torch.linalg.cholesky_ex(moments + added * torch.eye(len(moments)).to(moments))
        if not failed.item():
            break
    return torch.cholesky_inverse(factor)


def _block(consumers: Sequence[_Consumer], free: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Return the next ``count`` units to drop, in order, and the error that each adds."""
    costs = torch.where(free, torch.stack([consumer.costs() for consumer in consumers]).sum(0), torch.inf)
    most = count if count == 1 else min(_CANDIDATES * count, int(free.sum()))
    candidates = costs.sort(stable=True).indices[:most]
    matrices = [[matrix.cpu() for matrix in consumer.among(candidates)] for consumer in consumers]
    precision, importance = (torch.stack(each).numpy() for each in zip(*matrices, strict=True))
    chosen, lost = _order(precision, importance, count)
    return candidates[chosen], lost


def _order(precision: Array, importance: Array, count: int) -> tuple[list[int], list[float]]:
    """Return ``count`` of the units of P and A (consumers × units × units) in the order to drop them, and the errors.

    Dropping unit j changes both by outer products of a row r and a column,

        P ← P − pⱼ·rᵀ,    A ← A − h·rᵀ − r·hᵀ,    r = pⱼ / P_jj,   h = aⱼ − A_jj·r/2

    of which only the diagonals and the rows of the chosen units are needed: these are computed when they are.
    """
    diagonals = [m.diagonal(axis1=1, axis2=2).copy() for m in (precision, importance)]
    p, r, h = (np.zeros((len(precision), count, precision.shape[2])) for _ in range(3))
    taken = np.zeros(precision.shape[2])
    chosen: list[int] = []
    lost: list[float] = []
    for k in range(count):
        with np.errstate(over="ignore"):
            costs = (np.maximum(diagonals[1], 0) / np.maximum(diagonals[0], _TINY)).sum(0) + taken
        j = int(costs.argmin())
        chosen.append(j)
        lost.append(float(costs[j]))
        taken[j] = np.inf
        to_p, to_r, to_h = (each[:, None, :k, j] for each in (p, r, h))
        p[:, k] = precision[:, j] - (to_p @ r[:, :k])[:, 0]
        r[:, k] = p[:, k] / p[:, k, j, None]
        row = importance[:, j] - (to_h @ r[:, :k] + to_r @ h[:, :k])[:, 0]
        h[:, k] = row - r[:, k] * (row[:, j, None] / 2)
        diagonals[0] -= p[:, k] * r[:, k]
        diagonals[1] -= 2 * h[:, k] * r[:, k]
    return chosen, lost
