"""decompose: layers into low-rank factors.

    Linear, 1×1 conv:   W ≈ last · first                    (truncated SVD, balanced)
    k×k conv:           W ≈ core ×_C first ×_S last         (Tucker-2, orthonormal outer factors)

and so for convs of one and three dimensions and transposed ones, of which the core or the last factor is transposed.
Where `calibrate` has left moments, the factors are those of the least error of the layer's *output* on the calibration
inputs (fxlrd/factor/whiten.py), and a bias keeps the mean of that. Where `allocate` has left ranks, those are taken.

Approximate: the weight's relative error, or the output's where it was fitted, is recorded at each site. At full rank
it is exact. Everything but the weight is carried over exactly (fxlrd/layers/build.py). Left alone: the stem (a conv
that reads the model's input, of at most four channels), what ``skip`` names, and whatever cannot be cut, each with the
reason.

    x ─ conv2 ─ y     →     x ─ conv2.first ─ conv2.core ─ conv2.last ─ y
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxlrd.allocation.plan import planned
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.facts import provenance
from fxlrd.graph.guards import FACTOR, check_names, is_stem, matches, replaceable, skip_reason, stem_reason
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import annotate, calls, fork, layers, replace
from fxlrd.layers.build import decomposed
from fxlrd.layers.forms import Ranks, explicit_ranks, form, ranks_for_ratio, ranks_text
from fxlrd.passes.contract import UNNAMED, PassResult, Site, Skip, names
from fxlrd.progress import Progress, quiet
from fxlrd.ranks import check_ratio

UNPLANNED = Reason("original-planned", "allocate keeps it as it is")


@dataclass(frozen=True)
class Decompose:
    """Replace conv and linear layers by their low-rank factors.

    ``ratio`` is the compression ratio of each layer (parameters before / after). ``ranks`` overrides it: one
    int or tuple for all layers, or a mapping from names or globs to those, in which case only the layers it
    names are decomposed. A Tucker-2 form takes (r1, r2), an int stands for both; ranks are clipped to full
    rank. Without ``ranks``, those that `allocate` left come before ``ratio``. ``skip`` takes names and globs of
    layers or of modules around them. ``beta`` is r2/r1. ``sweeps`` of orthogonal iteration refine a Tucker-2 form of
    the weights. ``fit=False`` approximates the weights alone, whatever was calibrated.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    ratio: float = 2.0
    ranks: int | tuple[int | None, ...] | Mapping[str, int | tuple[int | None, ...]] | None = None
    skip: tuple[str, ...] = ()
    beta: float = 1.0
    sweeps: int = 1
    fit: bool = True

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        object.__setattr__(self, "skip", names(self.skip))
        if isinstance(self.ranks, list):
            object.__setattr__(self, "ranks", tuple(self.ranks))
        if not isinstance(self.beta, (int, float)) or not 0 < self.beta < math.inf:
            raise FxlrdError(f"decompose: beta={self.beta}: the ratio r2/r1 is a finite number above 0")
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise FxlrdError(f"decompose: sweeps={self.sweeps}: at least one is needed")
        if isinstance(self.ranks, int) and self.ranks < 1:
            raise FxlrdError(f"decompose: ranks={self.ranks}: a rank is a whole number of at least 1")

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a decomposed copy of ``gm`` that shares the layers left alone.

        Raises FxlrdError where the ratio leaves a wide layer less than rank 1, and for a name or glob in
        ``skip`` or ``ranks`` that fits no layer.
        """
        gm = fork(gm)
        annotate(gm)
        check_names(gm, [*self.skip, *(self.ranks if isinstance(self.ranks, Mapping) else ())])
        sites: list[Site] = []
        skipped: list[Skip] = []
        reasons = replaceable(gm)
        for name, module in progress(list(layers(gm).items()), "decompose"):
            ranks = self._ranks(gm, name, module, reasons[name])
            if isinstance(ranks, Reason):
                skipped.append(Skip(_origin(gm, name), ranks))
                continue
            found = statistics_of(calls(gm, name)) if self.fit else None
            fit = found.fit(module) if found is not None else None
            factors, error = decomposed(module, ranks, self.sweeps, fit)
            replace(gm, name, factors, ranks, error=error, fitted=fit is not None)
            fitted = "" if fit is None else ", fitted to data"
            sites.append(Site(name, False, f"{form(module)} at rank {ranks_text(ranks)}{fitted}", ranks=ranks))
        self._check_reach(sites, skipped)
        gm.graph.lint()
        gm.recompile()
        return PassResult(gm, tuple(sites), tuple(skipped))

    def _ranks(self, gm: fx.GraphModule, name: str, module: nn.Module, guard: Reason | None) -> Ranks | Reason:
        """Return the layer's ranks, or why it is left alone."""
        node = calls(gm, name)[0]
        known = provenance(node)
        if known is not None and known.role != "original":
            return FACTOR
        if guard is not None:
            return guard
        if (pattern := matches(name, self.skip)) is not None:
            return skip_reason(pattern)
        try:
            plan = planned(gm) if self.ranks is None else None
            if plan is not None:
                return plan.ranks.get(name, UNPLANNED)
            if isinstance(self.ranks, Mapping):
                pattern = matches(name, list(self.ranks))
                return UNNAMED if pattern is None else explicit_ranks(module, self.ranks[pattern])
            if is_stem(gm, name, module):
                return stem_reason(module)
            if self.ranks is not None:
                return explicit_ranks(module, self.ranks)
            return ranks_for_ratio(module, self.ratio, self.beta)
        except FxlrdError as error:
            raise FxlrdError(f"{name}: {error}") from None

    def _check_reach(self, sites: list[Site], skipped: list[Skip]) -> None:
        narrow = [s for s in skipped if s.reason.code == "too-narrow"]
        done = sites or any(s.reason.code == FACTOR.code for s in skipped)
        if narrow and not done and self.ranks is None:
            raise FxlrdError(f"{narrow[0].name}: {narrow[0].reason}, nor for any other layer: use a smaller ratio")


def _origin(gm: fx.GraphModule, name: str) -> str:
    known = provenance(calls(gm, name)[0])
    return known.name if known is not None else name
