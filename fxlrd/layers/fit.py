"""What a layer's factors are fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxlrd.factor.whiten import Root, root
from fxlrd.layers.kinds import channels_per_group, kernel_area


@dataclass
class Moments:
    """Running moments of one tensor's C channels over every position of every input.

    ``second`` (C×C) and ``mean`` (C) are float64 expectations; ``count`` is the number of positions seen.
    """

    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Moments:
        """Return moments that have seen nothing."""
        zeros = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        return cls(zeros[0].clone(), zeros)

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x`` (N×C), in float64.

        Products rounded to float32 would leave noise of 1e-7 in directions that carry nothing, and a least
        squares fit would divide by it.
        """
        x = x.detach().double()
        self.products += x.mT @ x
        self.total += x.sum(0)
        self.count += len(x)

    @property
    def second(self) -> Tensor:
        """E[x·xᵀ]."""
        return self.products / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """E[(x − mean)·(x − mean)ᵀ], positive semidefinite in spite of rounding where channels hardly vary."""
        rounding = 1e-12 * self.second.diagonal()
        return self.second - torch.outer(self.mean, self.mean) + rounding.diag()

    @property
    def ridge(self) -> float:
        """How much a fit to these moments should be regularised, relative to their mean variance.

        Nothing from four positions a channel on; below, a fit would follow the sample.
        """
        return 1e-2 * max(0.0, len(self.total) / max(self.count, 1) - 0.25)


@dataclass
class Statistics:
    """What calibration saw of a layer: moments of what it reads, of the patches that its kernel sees (channel-major,
    only where asked for), and Γ, how much its output matters (`fxlrd.calibration.importance`).
    """

    reads: Moments | None = None
    patches: Moments | None = None
    matters: Tensor | None = None

    def __add__(self, other: Statistics) -> Statistics:
        both = (self.matters, other.matters)
        return Statistics(
            _sum(self.reads, other.reads),
            _sum(self.patches, other.patches),
            None if any(m is None for m in both) else both[0] + both[1],  # type: ignore[operator]
        )

    def fit(self, module: nn.Module) -> Fit | None:
        """Return what the layer's factors are to be fitted to, or None where its input's moments are not known."""
        c_in, _, groups = channels_per_group(module)
        width = c_in * groups
        if self.reads is None or len(self.reads.total) != width or not self.reads.count:
            return None
        patches = self.patches
        if patches is not None and (not patches.count or len(patches.total) != width * kernel_area(module)):
            patches = None
        return Fit(
            self.reads.covariance,
            self.reads.mean,
            self.reads.ridge,
            None if patches is None else patches.covariance,
            None if patches is None else patches.mean,
            0.0 if patches is None else patches.ridge,
            self.matters,
        )


def _sum(a: Moments | None, b: Moments | None) -> Moments | None:
    if a is None or b is None or a is b:
        return a if a is b else None
    return Moments(a.total + b.total, a.products + b.products, a.count + b.count)


class Fit(NamedTuple):
    """What a layer's factors are fitted to (float64), for C input and S output channels.

    ``second`` (C×C) are the centred second moments of the input and ``mean`` (C) its mean; ``ridge`` says how much
    more variance, relative to the mean one, few samples call for. The same of the patches that the kernel sees
    (C·K, channel-major), where known. ``matters`` (S×S) is Γ (`fxlrd.calibration.importance`), where known.
    """

    second: Tensor
    mean: Tensor
    ridge: float = 0.0
    patches: Tensor | None = None
    patch_mean: Tensor | None = None
    patch_ridge: float = 0.0
    matters: Tensor | None = None


MATTERS_RIDGE = 1e-2
"""Share of the mean that is added to every direction of Γ: it is an estimate, and no direction matters nothing."""


def roots(module: nn.Module, fit: Fit) -> tuple[Root, Root | None]:
    """Return the roots of the input's moments (G, C/G, C/G) and of Γ (G, S/G, S/G), group by group."""
    groups = channels_per_group(module)[2]
    reads = root(_diagonal_blocks(fit.second, groups), fit.ridge)
    return reads, None if fit.matters is None else root(_diagonal_blocks(fit.matters, groups), MATTERS_RIDGE)


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    blocks = matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
