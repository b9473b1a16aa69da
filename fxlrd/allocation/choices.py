"""The forms that a layer can take, each with its cost and its predicted error.

The predicted error of a layer's form is that of the layer's output on the calibration inputs, weighted by how much
each direction of it matters (fxlrd/calibration/importance.py): the relative squared error of the *model's* output
that this one layer causes. Those of different layers add up, as far as they are independent. The errors at all ranks
of a layer come from one factorisation: with the singular values σ of the whitened weight Kᵀ·W·R, Γ = K·Kᵀ and
G = R·Rᵀ, or the core C of its higher-order SVD,

    SVD        error(R) = Σ_{i>R} σᵢ²
    Tucker-2   error(r1, r2) = ‖C‖² − ‖C[:r2, :r1]‖²

(an upper bound for Tucker-2, whose bases are refined afterwards). Without Γ the error is relative to the layer's own
output, without moments to its weight: then the errors of different layers compare only roughly.

Where Γ is zero, no change of the layer reaches the model's output. Its errors are then those of its own output, times
`NEGLIGIBLE`: of forms that all cost nothing, that nearest to the original is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fxlrd.errors import Reason
from fxlrd.factor.basis import left_basis
from fxlrd.factor.failures import check_finite
from fxlrd.factor.whiten import Root
from fxlrd.layers.build import decomposed, with_mean_output
from fxlrd.layers.fit import Fit, input_root, metrics, output_root, roots
from fxlrd.layers.forms import Ranks, form, parameters, ranks_by_ratio
from fxlrd.layers.kinds import as_layer, channels_per_group, kernel_area, kernel_share
from fxlrd.layers.weights import weight_blocks

_STEPS = 16
"""Ranks that are tried along each mode of a Tucker-2 form, at most; twice as many for an SVD."""
RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
"""Compression ratios whose ranks are always among the choices."""


NEGLIGIBLE = 1e-12
"""The predicted error of a layer without any output, if no output of it matters."""


@dataclass(frozen=True)
class Choice:
    """A form of one layer: its ranks (None: the original), predicted error, and cost in the measure of the budget."""

    ranks: Ranks | None
    error: float
    cost: float


class Curve:
    """The predicted error of one layer at any ranks, from one factorisation."""

    def __init__(self, module: nn.Module, fit: Fit | None) -> None:
        self.module, self.fit = module, fit
        silent = fit is not None and fit.importance is not None and not bool(fit.importance.any())
        used = fit._replace(importance=None) if fit is not None and silent else fit
        absolute = used is not None and used.importance is not None
        self.form = form(module)
        if self.form == "svd":
            self.energy, self.basis, self.root = _svd_energy(module, used)
        else:
            self.energy = _tucker_energy(_whitened(module, used))
        check_finite(self.energy)
        total = float(self.energy[tuple(-1 for _ in self._full)])
        self.scale = kernel_share(module) if absolute or total == 0 else (NEGLIGIBLE if silent else 1) / total

    def error(self, ranks: Ranks) -> float:
        """Return the predicted error at ``ranks``."""
        at = tuple(top if r is None else min(r, top) for r, top in zip(ranks, self._full, strict=True))
        total = float(self.energy[tuple(-1 for _ in at)])
        return self.scale * max(0.0, total - float(self.energy[at]))

    def maker(self, ranks: Ranks) -> Callable[[], nn.Module]:
        """Return what makes the layer's form at ``ranks``, as `fxlrd.layers.build.decomposed` does but for its balance.

        An SVD form is made at once, since it takes little beside the curve, and the curve's matrices need not be kept.
        """
        if self.form != "svd" or self.fit is None:
            module, fit = self.module, self.fit
            return lambda: decomposed(module, ranks, 1, fit)[0]
        made = self._svd(self.fit, ranks)
        return lambda: made

    def _svd(self, fit: Fit, ranks: Ranks) -> nn.Sequential:
        (rank,) = ranks
        weight = weight_blocks(self.module).double().flatten(2)
        basis, root = self.basis[..., :rank], self.root
        if weight.shape[1] <= weight.shape[2]:  # W' = K⁻ᵀ·Q·Qᵀ·Kᵀ·W
            first, last = basis.mT, basis
            if root is not None:
                first, last = first @ root.root.mT, root.inverse.mT @ last
            return with_mean_output(self.module, first @ weight, last, fit)
        assert root is not None  # there is a fit
        return with_mean_output(  # W' = W·R·Q·Qᵀ·R⁻¹
            self.module, basis.mT @ root.inverse, weight @ (root.root @ basis), fit
        )

    @property
    def _full(self) -> tuple[int, ...]:
        return tuple(n - 1 for n in self.energy.shape)


def _svd_energy(module: nn.Module, fit: Fit | None) -> tuple[Tensor, Tensor, Root | None]:
    """Return the energy retained at ranks 0…n, all groups together, and the singular vectors of the shorter side.

    With a fit, the root of the shorter side's metric comes with them: that of the longer one is not needed, since

        M = Kᵀ·W·R,   M·Mᵀ = Kᵀ·(W·G·Wᵀ)·K,   Mᵀ·M = Rᵀ·(Wᵀ·Γ·W)·R
    """
    weight = weight_blocks(module).double().flatten(2)
    inputs, outputs = (None, None) if fit is None else metrics(module, fit)
    if weight.shape[1] <= weight.shape[2]:
        root = None if fit is None or fit.importance is None else output_root(module, fit.importance)
        small = (weight if inputs is None else weight @ inputs) @ weight.mT
    else:
        root = None if fit is None else input_root(module, fit)
        small = weight.mT @ (weight if outputs is None else outputs @ weight)
    if root is not None:
        small = root.root.mT @ small @ root.root
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    energy = values.flip(-1).clamp_min(0).sum(0)
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)]), vectors.flip(-1), root


def _whitened(module: nn.Module, fit: Fit | None) -> Tensor:
    """Return Kᵀ·W·R (G, S/G, C/G, kernel positions), at each position."""
    weight = weight_blocks(module).double()
    weight = weight.reshape(*weight.shape[:3], kernel_area(module))
    if fit is None:
        return weight
    reads, makes = roots(module, fit)
    weight = torch.einsum("gsck,gcd->gsdk", weight, reads.root)
    return weight if makes is None else torch.einsum("gst,gsck->gtck", makes.root, weight)


def _tucker_energy(weight: Tensor) -> Tensor:
    """Return the energy retained at (r1, r2), 0…C by 0…S, all groups together."""
    ins = left_basis(weight.transpose(1, 2).flatten(2), weight.shape[2])
    outs = left_basis(weight.flatten(2), weight.shape[1])
    core = torch.einsum("gsck,gci,gso->giok", weight, ins, outs)
    energy = core.square().sum((0, 3))
    return torch.nn.functional.pad(energy.cumsum(0).cumsum(1), (1, 0, 1, 0))


def candidate_ranks(module: nn.Module, ratios: Iterable[float] = RATIOS, multiple: int = 1) -> list[Ranks]:
    """Return candidate ranks that save parameters: an even grid, in multiples of ``multiple`` (all groups together).

    If ``multiple`` is 1, the ranks that the compression ratios give are candidates too.
    """
    c_in, c_out, groups = channels_per_group(module)
    if min(c_in, c_out) == 1:
        return []
    step = max(1, multiple // math.gcd(multiple, groups))
    candidates: list[Ranks]
    if form(module) == "svd":
        candidates = [(r,) for r in _grid(min(c_in, c_out), step, 2 * _STEPS)]
    else:
        ins, outs = ([*_grid(n, step, _STEPS), None] for n in (c_in, c_out))
        candidates = [(r1, r2) for r1 in ins for r2 in outs if r1 or r2]
    if multiple == 1:
        by_ratio = (ranks_by_ratio(module, ratio) for ratio in ratios)
        candidates += [r for r in by_ratio if not isinstance(r, Reason)]
    return [r for r in dict.fromkeys(candidates) if parameters(module, r) < as_layer(module).weight.numel()]


def _grid(full: int, step: int, count: int) -> list[int]:
    stride = step * max(1, math.ceil(full / (step * count)))
    return [r for r in range(stride, full, stride) if r < full]


class Priced(Protocol):
    """Anything with a cost and an error."""

    @property
    def cost(self) -> float:
        """The cost."""
        ...

    @property
    def error(self) -> float:
        """The predicted error."""
        ...


P = TypeVar("P", bound=Priced)


def pareto(choices: Iterable[P], most: int = 48) -> list[P]:
    """Return the choices that no other beats in both cost and error, cheapest first, thinned out to ``most``."""
    front: list[P] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.error)):
        if not front or choice.error < front[-1].error:
            front.append(choice)
    if len(front) <= most:
        return front
    picks = sorted({round(i * (len(front) - 1) / (most - 1)) for i in range(most)})
    return [front[i] for i in picks]
