"""Statistics of a layer on calibration inputs, and what its factors are fitted to.

With C input channels, S output channels and a kernel of K positions: moments of the input (C×C), of the patches that
the kernel is applied to (C·K × C·K, channel-major), and the importance Γ of the output (S×S). All in float64 but Γ,
which is an estimate and in the precision of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxlrd.errors import Reason
from fxlrd.factor.products import add_gram, gram
from fxlrd.factor.ridge import GRID, best_ridge, with_ridge
from fxlrd.factor.whiten import Root, regularised, root
from fxlrd.layers.kinds import channels_per_group, kernel_area

HELD_OUT = 8
"""One position in so many is held out while there are few, to choose the ridge by; fewer where that would be many."""

MOST = 512
"""Positions that are held out at most; one for each channel where there are more channels."""

_ROUNDING = 1e-12
"""Variance of a channel, as a share of its second moment, that may be rounding: how it varies with others is noise."""


@dataclass
class HeldOut:
    """Positions of a tensor that its ridge is chosen by, one in ``every`` so many.

    ``blocks`` (N×C each) are the last positions of one input or several: all of a block are held out, since
    neighbours have much in common.
    """

    blocks: list[Tensor]
    every: int = HELD_OUT

    @property
    def rows(self) -> Tensor:
        """The positions (N×C)."""
        return torch.cat(self.blocks)

    @property
    def count(self) -> int:
        """The number of positions."""
        return sum(len(block) for block in self.blocks)

    def followed_by(self, x: Tensor, count: int) -> HeldOut:
        """Return them with some of the last rows of ``x``, where ``count`` positions have been seen, all together.

        They come from everything that was seen: where they would be too many, the last half of each block stays, and
        of what follows fewer are held out.
        """
        blocks, every = self.blocks, self.every
        while (count + every - 2) // every > max(MOST, x.shape[1]):
            blocks, every = _last_halves(blocks), 2 * every
        due = (count + every - 2) // every - sum(len(block) for block in blocks)
        return HeldOut([*blocks, x[max(0, len(x) - due) :].clone()] if due > 0 else blocks, every)

    def __add__(self, other: HeldOut) -> HeldOut:
        """Return the positions of both."""
        return HeldOut(self.blocks + other.blocks, max(self.every, other.every))


def _last_halves(blocks: list[Tensor]) -> list[Tensor]:
    """Return the last half of the rows of each block, and every second of blocks that have only one."""
    halves, due = [], 0
    for block in blocks:
        due += len(block)
        if due > 1:
            halves.append(block[-(due // 2) :].clone())
        due %= 2
    return halves


@dataclass
class Moments:
    """Running moments of one tensor's C channels over every position of every input.

    ``total`` (C) is Σ x, ``products`` (C×C) is Σ x·xᵀ, in float64; ``count`` is the number of positions, of which
    ``held_out`` has some.
    """

    total: Tensor
    products: Tensor
    count: int = 0
    held_out: HeldOut = field(default_factory=lambda: HeldOut([]))
    _ridge: float | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Moments:
        """Return the moments of no positions."""
        zeros = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        return cls(zeros[0].clone(), zeros)

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x`` (N×C), in float64.

        Products rounded to float32 would leave noise of 1e-7 in directions that carry nothing, and a least
        squares fit would divide by it. Of the last rows some are held out: with those of other inputs they have least
        in common.
        """
        x = x.detach()
        add_gram(self.products, x, sums=self.total)
        self.count += len(x)
        self._ridge = None
        self.held_out = self.held_out.followed_by(x, self.count)

    def remove(self, x: Tensor, held_out: HeldOut) -> None:
        """Remove rows that were added last; ``held_out`` is what was held out before."""
        add_gram(self.products, x.detach(), -1, self.total)
        self.count -= len(x)
        self.held_out, self._ridge = held_out, None

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the positions of both."""
        held_out = self.held_out + other.held_out
        return Moments(self.total + other.total, self.products + other.products, self.count + other.count, held_out)

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
        second, mean = self.second, self.mean
        rounding = _ROUNDING * second.diagonal()
        covariance = second.addr_(mean, mean, alpha=-1)
        covariance.diagonal().add_(rounding)
        return covariance

    @property
    def ridge(self) -> float:
        """The regularisation that a fit to these moments needs, as a share of each channel's variance.

        It is chosen by the positions held out (fxlrd/factor/ridge.py).
        """
        if self._ridge is None:
            self._ridge = self._chosen()
        return self._ridge

    def _chosen(self) -> float:
        others = self.held_out
        fitted = self.count - others.count
        if not others.count or not fitted:
            return GRID[-1]
        rows = others.rows.double()
        mean = (self.total - rows.sum(0)) / fitted
        covariance = (self.products - gram(rows)) / fitted - torch.outer(mean, mean)
        deviations = rows - mean
        variance = covariance.diagonal() + deviations.square().mean(0)
        same = variance <= _ROUNDING * self.products.diagonal() / self.count
        covariance[same], covariance[:, same], deviations[:, same] = 0, 0, 0
        return best_ridge(covariance, deviations)


@dataclass
class Statistics:
    """What calibration measured of a layer.

    Attributes:
        input_moments: those of the input's channels.
        patch_moments: those of the patches that the kernel is applied to, where `Calibrate` was asked for them.
        importance: Γ, the importance of the directions of the output (fxlrd/calibration/importance.py).
        called: whether the layer was called at all.
        failure: why something of it could not be measured.
    """

    input_moments: Moments | None = None
    patch_moments: Moments | None = None
    importance: Tensor | None = None
    called: bool = True
    failure: Reason | None = None

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
            failure=self.failure or other.failure,
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
    return a + b


class Fit(NamedTuple):
    """What a layer's factors are fitted to.

    Attributes:
        covariance: that of the input (C×C).
        mean: that of the input (C).
        ridge: the share of each channel's variance that is added to it; see `Moments.ridge`.
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

    @property
    def regularised(self) -> Tensor:
        """The covariance of the input with the ridge added."""
        return with_ridge(self.covariance, self.ridge)

    @property
    def regularised_patches(self) -> Tensor | None:
        """The covariance of the patches with the ridge added."""
        return None if self.patch_covariance is None else with_ridge(self.patch_covariance, self.patch_ridge)


IMPORTANCE_RIDGE = 1e-2
"""Share of the mean that is added to every direction of Γ: an estimate of no importance is an error of the estimate."""


def roots(module: nn.Module, fit: Fit) -> tuple[Root, Root | None]:
    """Return the roots of the input's covariance (G, C/G, C/G) and of Γ (G, S/G, S/G), for each of G groups."""
    return input_root(module, fit), None if fit.importance is None else output_root(module, fit.importance)


def input_root(module: nn.Module, fit: Fit) -> Root:
    """Return the root of the input's covariance, for each group."""
    return root(_diagonal_blocks(fit.regularised, channels_per_group(module)[2]))


def output_root(module: nn.Module, importance: Tensor) -> Root:
    """Return the root of Γ, for each group."""
    return root(_diagonal_blocks(importance, channels_per_group(module)[2]), IMPORTANCE_RIDGE)


def metrics(module: nn.Module, fit: Fit) -> tuple[Tensor, Tensor | None]:
    """Return what `roots` returns the roots of."""
    groups = channels_per_group(module)[2]
    inputs = regularised(_diagonal_blocks(fit.regularised, groups))
    if fit.importance is None:
        return inputs, None
    return inputs, regularised(_diagonal_blocks(fit.importance, groups), IMPORTANCE_RIDGE)


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """Return the blocks (G, N/G, N/G) on the diagonal of a matrix (N×N)."""
    blocks = matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
