"""Which units of a layer to drop first, and what that costs: backward elimination on their second moments.

A consumer with weight W reads C units h with moments G = E[h·hᵀ]; Γ weighs its outputs. With the inverse P = G⁻¹,
the best linear reconstruction of units R from the others S, and the error that dropping R then makes, are

    h_R ≈ −P_RR⁻¹·P_RS·h_S,        E‖Γ^½·ΔW·h‖² = tr(A_RR·P_RR⁻¹),    A = WᵀΓW

so that the unit j of the least A_jj / P_jj is dropped. The others take over what it carried, and P is that of those:

    W_S ← W_S − W_R·P_RR⁻¹·P_RS        P_SS ← P_SS − P_SR·P_RR⁻¹·P_RS

One inverse therefore gives all numbers of units: those that few units lack are those that more lack, and some others
(Optimal Brain Surgeon, Hassibi and Stork 1993, on the units of a layer; here W enters as A alone). For several
consumers the errors add up. A consumer whose bias is refitted has the covariance for G: that is the inverse of
G bordered by a constant, without its border.

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
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCKS = 48
"""Units are dropped in so many blocks: within one the order is found among candidates, all else is updated after it."""

_CANDIDATES = 4
"""Candidates for a block, as a multiple of its size."""

_SINGULAR = 1e-14
"""Share of the sum of all variances that is added to each where the moments are singular: beyond their rounding."""

_INFLATION = 1e4
"""P is inverted anew where the largest variance inflation (diagonal of P, unit variances) has fallen by this factor."""


class Reading(NamedTuple):
    """What a consumer reads: the units' second moments or covariance G (C×C), A = WᵀΓW (C×C), and the ridge.

    With a ``ridge`` ρ, G is (G + ρ·diag G) / (1 + ρ).
    """

    second: Tensor
    importance: Tensor
    ridge: float = 0.0


class Elimination(NamedTuple):
    """Units in the order in which they are dropped, and the error after each.

    ``errors[d]`` is tr(A·R), summed over the consumers, with the first d units dropped and R the moments of what the
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
    remaining = torch.arange(count, device=consumers[0].precision.device)
    dropped, losses = [remaining[:0]], [0.0]
    while len(remaining) > fewest:
        block, lost = _block(consumers, min(max(1, count // _BLOCKS), len(remaining) - fewest))
        dropped.append(remaining[block])
        losses += lost
        others = torch.ones(len(remaining), dtype=torch.bool, device=remaining.device)
        others[block] = False
        retained = others.nonzero().flatten()
        remaining = remaining[retained]
        for consumer in consumers:
            consumer.drop(block, retained)
    return Elimination(count, torch.cat(dropped), torch.tensor(losses, dtype=torch.float64).cumsum(0))


class _Consumer:
    """The state of one consumer, for units of unit variance: P and A of the units that remain."""

    def __init__(self, reading: Reading) -> None:
        second, importance = reading.second.double(), reading.importance.double()
        scale = second.diagonal().clamp_min(0).sqrt()
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a unit that is always zero
        self.moments = second / torch.outer(divisor, divisor)
        self.moments /= 1 + reading.ridge
        self.moments.diagonal().fill_(1)
        self.importance = importance * torch.outer(scale, scale)
        self.units = torch.arange(len(second), device=second.device)
        self._invert()

    def _invert(self) -> None:
        self.precision = _inverse(self.moments[self.units][:, self.units])
        self.inflation = float(self.precision.diagonal().max())

    def drop(self, dropped: Tensor, retained: Tensor) -> None:
        """Let the retained units take over from the dropped ones."""
        p, a = self.precision, self.importance
        rows = p[dropped]
        weights = torch.linalg.solve(rows[:, dropped], rows[:, retained])
        cross = a[retained][:, dropped] @ weights
        carried = weights.mT @ (a[dropped][:, dropped] @ weights)
        self.units = self.units[retained]
        self.importance = a[retained][:, retained] - cross - cross.mT + carried
        self.precision = p[retained][:, retained] - rows[:, retained].mT @ weights
        if len(retained) and float(self.precision.diagonal().max()) * _INFLATION < self.inflation:
            self._invert()


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


def _block(consumers: Sequence[_Consumer], count: int) -> tuple[Tensor, list[float]]:
    """Return the next ``count`` units to drop, in order, and the error that each adds."""
    costs = sum(_costs(consumer.precision, consumer.importance) for consumer in consumers)
    assert isinstance(costs, Tensor)
    candidates = costs.sort(stable=True).indices[: count if count == 1 else _CANDIDATES * count]
    local = [
        (consumer.precision[candidates][:, candidates].cpu(), consumer.importance[candidates][:, candidates].cpu())
        for consumer in consumers
    ]
    free = torch.ones(len(candidates), dtype=torch.bool)
    chosen: list[int] = []
    lost: list[float] = []
    for _ in range(count):
        costs = torch.stack([_costs(p, a) for p, a in local]).sum(0)
        costs = torch.where(free, costs, torch.inf)
        j = int(costs.argmin())
        chosen.append(j)
        lost.append(float(costs[j]))
        free[j] = False
        for p, a in local:
            _drop_one(p, a, j)
    return candidates[chosen], lost


def _costs(precision: Tensor, importance: Tensor) -> Tensor:
    """Return A_jj / P_jj of each unit."""
    return importance.diagonal().clamp_min(0) / precision.diagonal().clamp_min(torch.finfo(torch.float64).tiny)


def _drop_one(precision: Tensor, importance: Tensor, j: int) -> None:
    """Update P and A in place for dropping unit j; its own row and column become zero."""
    row = precision[j] / precision[j, j]
    precision -= torch.outer(precision[:, j], row)
    cross = torch.outer(importance[:, j], row)
    importance += importance[j, j] * torch.outer(row, row) - cross - cross.mT
