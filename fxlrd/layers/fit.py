"""Statistics of a layer on calibration inputs, and what its factors are fitted to.

With C input channels, S output channels and a kernel of K positions: moments of the input (C×C), of the patches that
the kernel is applied to (C·K × C·K, channel-major), and the importance Γ of the output (S×S). All in float64.
"""

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

    ``total`` (C) is Σ x, ``products`` (C×C) is Σ x·xᵀ, in float64; ``count`` is the number of positions.
    """

    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Moments:
        """Return the moments of no positions."""
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
        """The regularisation that a fit to these moments needs, relative to their mean variance.

        0 from four positions per channel on. With fewer, a fit would follow the sample.
        """
        return 1e-2 * max(0.0, len(self.total) / max(self.count, 1) - 0.25)


@dataclass
class Statistics:
    """What calibration measured of a layer.

    Attributes:
        input_moments: those of the input's channels.
        patch_moments: those of the patches that the kernel is applied to, where `Calibrate` was asked for them.
        importance: Γ, the importance of the directions of the output (fxlrd/calibration/importance.py).
        called: whether the layer was called at all.
    """

    input_moments: Moments | None = None
    patch_moments: Moments | None = None
    importance: Tensor | None = None
    called: bool = True

    @property
    def reached(self) -> bool:
        """Whether any input reached the layer."""
        return self.called and (self.input_moments is None or self.input_moments.count > 0)

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of two calls together: what only one of them has is dropped."""
        if not (self.called and other.called):
            return self if self.called else other
        importances = [t for t in (self.importance, other.importance) if t is not None]
        return Statistics(
            _sum(self.input_moments, other.input_moments),
            _sum(self.patch_moments, other.patch_moments),
            importances[0] + importances[1] if len(importances) == 2 else None,
        )

    def fit(self, module: nn.Module) -> Fit | None:
        """Return what the layer's factors are to be fitted to, or None without moments of its input."""
        c_in, _, groups = channels_per_group(module)
        inputs = _moments_of(self.input_moments, c_in * groups)
        patches = _moments_of(self.patch_moments, c_in * groups * kernel_area(module))
        if inputs is None:
            return None
        fit = Fit(inputs.covariance, inputs.mean, inputs.ridge, importance=self.importance)
        if patches is None:
            return fit
        return fit._replace(patch_covariance=patches.covariance, patch_mean=patches.mean, patch_ridge=patches.ridge)


def _moments_of(moments: Moments | None, width: int) -> Moments | None:
    """Return the moments if there are any and they are those of ``width`` channels: a merge may have cut some since."""
    return moments if moments is not None and moments.count and len(moments.total) == width else None


def _sum(a: Moments | None, b: Moments | None) -> Moments | None:
    if a is None or b is None or a is b:
        return a if a is b else None
    return Moments(a.total + b.total, a.products + b.products, a.count + b.count)


class Fit(NamedTuple):
    """What a layer's factors are fitted to.

    Attributes:
        covariance: that of the input (C×C).
        mean: that of the input (C).
        ridge: the regularisation of the covariance, relative to its mean variance; see `Moments.ridge`.
        patch_covariance: that of the patches (C·K × C·K, channel-major), where it was measured; so the next two.
        importance: Γ (S×S), where it was measured.
    """

    covariance: Tensor
    mean: Tensor
    ridge: float = 0.0
    patch_covariance: Tensor | None = None
    patch_mean: Tensor | None = None
    patch_ridge: float = 0.0
    importance: Tensor | None = None


IMPORTANCE_RIDGE = 1e-2
"""Share of the mean that is added to every direction of Γ: an estimate of no importance is an error of the estimate."""


def roots(module: nn.Module, fit: Fit) -> tuple[Root, Root | None]:
    """Return the roots of the input's covariance (G, C/G, C/G) and of Γ (G, S/G, S/G), for each of G groups."""
    groups = channels_per_group(module)[2]
    input_root = root(_diagonal_blocks(fit.covariance, groups), fit.ridge)
    if fit.importance is None:
        return input_root, None
    return input_root, root(_diagonal_blocks(fit.importance, groups), IMPORTANCE_RIDGE)


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """Return the blocks (G, N/G, N/G) on the diagonal of a matrix (N×N)."""
    blocks = matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
