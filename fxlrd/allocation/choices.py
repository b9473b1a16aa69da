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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fxlrd.allocation.factored import whitened_gram
from fxlrd.errors import Reason
from fxlrd.factor.basis import left_basis, magnitude, working
from fxlrd.factor.failures import check_finite
from fxlrd.layers.fit import Fit, roots
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
    """The predicted error of one layer at any ranks, from one factorisation.

    Attributes:
        gram: what that of an SVD is of (`whitened_gram`), in units of its size, for the singular vectors: in the
            precision of the algebra.
    """

    def __init__(self, module: nn.Module, fit: Fit | None) -> None:
        self.module, self.fit = module, fit
        silent = fit is not None and fit.importance is not None and not bool(fit.importance.any())
        used = fit._replace(importance=None) if fit is not None and silent else fit
        absolute = used is not None and used.importance is not None
        self.form = form(module)
        self.gram: Tensor | None = None
        if self.form == "svd":
            gram = whitened_gram(module, used)
            self.energy = _svd_energy(gram)
            self.gram = (gram / magnitude(gram)).to(working(as_layer(module).weight).dtype)
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

    @property
    def _full(self) -> tuple[int, ...]:
        return tuple(n - 1 for n in self.energy.shape)


def _svd_energy(gram: Tensor) -> Tensor:
    """Return the energy retained at ranks 0…n, all groups together."""
    energy = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sum(0)
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)])


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
