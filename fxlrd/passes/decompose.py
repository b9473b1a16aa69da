"""decompose: layers into low-rank factors.

    Linear, 1×1 conv:   W ≈ last · first                    (truncated SVD, balanced)
    k×k conv:           W ≈ core ×_C first ×_S last         (Tucker-2, orthonormal outer factors)

and in the same way for convs of one and three dimensions and for transposed ones. After `calibrate`, the factors
minimise the error of the layer's *output* on the calibration inputs (fxlrd/factor/whiten.py), and the bias restores the
mean output. After `allocate`, the ranks are those of its plan.

Approximate; exact at full rank. The relative error of the weight, or of the output where the factors were fitted to
data, is recorded in the provenance. Everything but the weight is carried over exactly (fxlrd/layers/build.py). Left
alone, each with the reason: the stem (a conv that reads the model's input, of at most four channels), what ``skip``
names, and layers that must not be replaced or have no form with fewer parameters.

    x ─ conv2 ─ y     →     x ─ conv2.first ─ conv2.core ─ conv2.last ─ y
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

from torch import fx, nn

from fxlrd.allocation.plan import planned
from fxlrd.errors import FxlrdError, Reason
from fxlrd.freed import give_back_freed
from fxlrd.graph.facts import provenance
from fxlrd.graph.guards import FACTOR, MERGED, matches
from fxlrd.graph.layer import Layer, layers_of
from fxlrd.graph.originals import originals
from fxlrd.graph.surgery import calls, replace
from fxlrd.layers.build import decomposed
from fxlrd.layers.channels import channel_error
from fxlrd.layers.forms import Ranks, explicit_ranks, form, ranks_by_ratio, ranks_text
from fxlrd.passes.contract import UNNAMED, PassResult, Site, Skip, names
from fxlrd.passes.driver import in_turns, start
from fxlrd.progress import Progress, quiet
from fxlrd.ranks import check_ratio

UNPLANNED = Reason("original-planned", "allocate keeps it as it is")


class Form(NamedTuple):
    """A layer's factors, their relative error and that of the worst output channel, and whether they fit data."""

    factors: nn.Sequential
    error: float
    channel_error: float
    fitted: bool


@dataclass(frozen=True)
class Decompose:
    """Replace conv and linear layers by their low-rank factors.

    Attributes:
        ratio: the compression ratio of each layer: parameters before / after. A plan of `Allocate` overrides it.
        ranks: the ranks, in the place of ``ratio`` and of a plan: for all layers, or by name or glob, in which case
            only the layers named are decomposed. A Tucker-2 form takes (r1, r2) or an int for both. Ranks are clipped
            to full rank.
        skip: names and globs of layers, or of modules that contain them, to leave as they are.
        beta: r2/r1, for ``ratio``.
        sweeps: sweeps of orthogonal iteration that refine a Tucker-2 form of the weight.
        fit: fit to the statistics of `Calibrate`, if there are any; without, to the weights alone.
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

        Raises FxlrdError for a ratio that leaves a wide layer, or all layers, less than rank 1, and for a name or glob
        in ``skip`` or ``ranks`` that fits no layer.
        """
        by_name = self.ranks if isinstance(self.ranks, Mapping) else ()
        run = start(self, gm, progress, [*self.skip, *by_name])
        if self.ranks is None:
            _check_merges(run.gm)
        layers = [(layer, self._ranks(run.gm, layer)) for layer in layers_of(run.gm)]
        works = [partial(self._form, layer, ranks) for layer, ranks in layers if not isinstance(ranks, Reason)]
        forms = in_turns(run.gm, works)
        run.each(layers, lambda each: self._decompose(run.gm, *each, forms))
        if self.ranks is None:
            _check_reach(run.sites, run.skipped)
        return run.result()

    def _decompose(
        self, gm: fx.GraphModule, layer: Layer, ranks: Ranks | Reason, forms: Iterator[Callable[[], Form]]
    ) -> Site | Skip:
        if isinstance(ranks, Reason):
            return Skip(layer.origin, ranks)
        factors, error, worst, fitted = next(forms)()
        replace(gm, layer.name, factors, ranks, error=error, channel_error=worst, fitted=fitted)
        if (held := originals(gm)) is not None:
            held.let_go(layer.module)
        if sum(p.nbytes for p in layer.module.parameters()) >= _LARGE:
            give_back_freed()
        note = f"{form(layer.module)} at rank {ranks_text(ranks)}"
        return Site(layer.origin, False, f"{note}, fitted to data" if fitted else note, ranks=ranks)

    def _form(self, layer: Layer, ranks: Ranks) -> Form:
        fit = layer.statistics.fit(layer.module) if self.fit and layer.statistics is not None else None
        factors, error = decomposed(layer.module, ranks, self.sweeps, fit)
        return Form(factors, error, channel_error(layer.module, factors, fit), fit is not None)

    def _ranks(self, gm: fx.GraphModule, layer: Layer) -> Ranks | Reason:
        """Return the layer's ranks, or why it is left alone. A plan and a name in ``ranks`` overrule the stem's reason.

        Raises FxlrdError for a number of ranks that the layer's form does not take, and a ratio too large for it.
        """
        plan = planned(gm) if self.ranks is None else None
        overruled = "stem" if plan is not None or isinstance(self.ranks, Mapping) else None
        reason = MERGED if layer.role == "merged" else layer.why_left_alone(self.skip)
        if reason is not None and reason.code != overruled:
            return reason
        if plan is not None:
            return plan.ranks.get(layer.name, UNPLANNED)
        if self.ranks is None:
            return self._by_ratio(layer)
        wanted = self.ranks
        if isinstance(wanted, Mapping):
            if (pattern := matches(layer.name, list(wanted))) is None:
                return UNNAMED
            wanted = wanted[pattern]
        try:
            return explicit_ranks(layer.module, wanted)
        except FxlrdError as error:
            raise FxlrdError(f"{layer.name}: {error}") from None

    def _by_ratio(self, layer: Layer) -> Ranks | Reason:
        ranks = ranks_by_ratio(layer.module, self.ratio, self.beta)
        if isinstance(ranks, Reason) and ranks.code == "ratio-too-large":
            raise FxlrdError(f"{layer.name}: {ranks}")
        return ranks


def _check_merges(gm: fx.GraphModule) -> None:
    """Raise FxlrdError where a plan has merges that were not made: the budget would be missed."""
    plan = planned(gm)
    for name in plan.retained if plan is not None else ():
        nodes = calls(gm, name)  # none where it was composed into another one since
        if nodes and not any((p := provenance(node)) is not None and p.role == "merged" for node in nodes):
            raise FxlrdError(
                f"decompose: allocate has planned to merge the channels of {name}, which no pass has done: "
                "put merge before decompose, or write allocate{merge=false}"
            )


_LARGE = 2**20
"""Bytes of a layer whose decomposition leaves memory behind that is worth giving back."""


def _check_reach(sites: list[Site], skipped: list[Skip]) -> None:
    """Raise FxlrdError where the ratio leaves no layer a rank."""
    narrow = [skip for skip in skipped if skip.reason.code == "too-narrow"]
    done = sites or any(skip.reason.code in (FACTOR.code, MERGED.code) for skip in skipped)
    if narrow and not done:
        raise FxlrdError(f"{narrow[0].name}: {narrow[0].reason}, nor for any other layer: use a smaller ratio")
