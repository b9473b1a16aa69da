"""snap: ranks move to where the device is fast, by timing; where no form is faster, the original layer comes back.

Time is a staircase in the rank: a rank just above a step costs as much as the top of the step. For each decomposed
layer of rank R, ranks r in [floor·R, R] are timed on the device against the original layer.

    grid         R and the hardware multiples below it, once for all layers of one signature.
    algorithm1   the paper's scan of every r.

Both searches are in fxlrd/timing/search.py. A difference within the noise of the measurement is no gain: R stays, and
the original comes back unless the factors are faster by more than the noise. Approximate: outputs move against those of
the pass's input, also where an original comes back (towards the original model's). At a moved rank the result is what
`decompose` gives at that rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import ClassVar

from torch import fx, nn

from fxlrd.errors import FxlrdError, Reason, unknown
from fxlrd.graph.facts import FACTORS, Provenance, provenance
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls, infer_shape, restore
from fxlrd.layers.build import decomposed
from fxlrd.layers.channels import channel_error
from fxlrd.layers.fit import Fit
from fxlrd.layers.forms import Ranks, parameters, ranks_text
from fxlrd.layers.kinds import channels_per_group
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.inductor import Compile
from fxlrd.timing.layers import ORIGINAL, Place, placed, time_ranks
from fxlrd.timing.search import best_share, grid, largest_drop, scan
from fxlrd.timing.stopwatch import Stopwatch

SEARCHES = ("grid", "algorithm1")
_BRANCHED = Reason("branched", "its core is branched", "snap before branching")
_ENTANGLED = Reason("entangled", "part of what it does is in a neighbour, or the other way round", "snap first")
_NO_ORIGINAL = Reason("no-original", "its original layer is not known any more", "snap before the model is handed out")


@dataclass(frozen=True)
class Snap:
    """Move the ranks of decomposed layers to where the device is fast.

    ``search`` is grid or algorithm1. No rank falls below ``floor`` times its present value. ``trade`` is grid's
    exponent (fxlrd/timing/search.py), from 0, the fastest rank, to 1. ``compile`` times layers under Inductor with
    frozen weights instead of eagerly. ``seconds`` bounds the timing of one layer signature. ``cache=False`` neither
    reads nor writes the timings on disk. Raises FxlrdError for options out of range.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    search: str = "grid"
    floor: float = 0.75
    trade: float = 0.5
    compile: Compile = False
    seconds: float = 1.5
    cache: bool = True
    timer: Timer = field(default=compare, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise unknown("search", self.search, SEARCHES)
        if not 0 < self.floor <= 1:
            raise FxlrdError(f"snap: floor={self.floor} is not a fraction of the rank in (0, 1]")
        if not 0 <= self.trade <= 1:
            raise FxlrdError(f"snap: trade={self.trade} is not in [0, 1]")
        if not self.seconds > 0:
            raise FxlrdError(f"snap: seconds={self.seconds} leaves no time to measure")

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` at the snapped ranks. Nodes need shapes: capture or propagate first."""
        run = start(self, gm, progress)
        stopwatch = self._stopwatch()
        measured: dict[str, dict[str, Timing]] = {}

        def visit(item: tuple[str, Decomposed | Reason]) -> Site | Skip:
            name, layer = item
            if isinstance(layer, Reason):
                return Skip(name, layer)
            # algorithm1 times each layer, also those of one signature.
            shared = self._stopwatch() if self.search == "algorithm1" else stopwatch
            measured[name] = time_ranks(layer.places, self._candidates(layer), shared)
            return self._snap(run.gm, name, layer, measured[name])

        run.each(_layers(run.gm).items(), visit)
        return run.result(timings=measured)

    def _snap(self, gm: fx.GraphModule, name: str, layer: Decomposed, timings: dict[str, Timing]) -> Site | Skip:
        """Move one layer to the ranks that its timings favour."""
        chosen = self._choose(layer, timings)
        _apply(gm, name, layer, chosen, timings)
        if chosen == layer.ranks:
            text = f"rank {ranks_text(layer.ranks)} stays: no step below it pays"
            return Skip(name, Reason("no-faster-rank", text))
        return Site(name, False, _note(layer, chosen, timings), timings, chosen, layer.ranks)

    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(self.compile, self.seconds, self.cache, self.timer)

    def _candidates(self, layer: Decomposed) -> list[Ranks]:
        """Return the ranks to time, from the present one downward."""
        lowest: Ranks = tuple(None if r is None else math.ceil(self.floor * r) for r in layer.ranks)
        if self.search == "grid":
            return grid(layer.ranks, lowest, channels_per_group(layer.original)[2])
        return scan(layer.ranks, lowest)

    def _choose(self, layer: Decomposed, timings: dict[str, Timing]) -> Ranks | None:
        """Return the ranks to take; None is the original layer."""
        candidates = self._candidates(layer)
        if self.search == "algorithm1":
            chosen = largest_drop(candidates, timings)
        else:
            chosen = best_share(candidates, timings, lambda r: parameters(layer.original, r), self.trade)
        if timings[ranks_text(chosen)].faster():
            return chosen
        fastest = min(candidates, key=lambda r: timings[ranks_text(r)].ratio)
        return fastest if timings[ranks_text(fastest)].faster() else None


@dataclass(frozen=True)
class Decomposed:
    """A decomposed layer: its original's inputs, its present ranks, and what its factors were fitted to."""

    places: list[Place]
    ranks: Ranks
    fit: Fit | None

    @property
    def original(self) -> nn.Module:
        """The original layer."""
        return self.places[0].original


def _layers(gm: fx.GraphModule) -> dict[str, Decomposed | Reason]:
    """Return the decomposed layers by name, or why one cannot be timed."""
    layers: dict[str, Decomposed | Reason] = {}
    for node in gm.graph.nodes:
        origin = provenance(node)
        if origin is None or origin.role not in FACTORS or origin.name in layers:
            continue
        if (reason := _why_not(gm, origin)) is not None:
            layers[origin.name] = reason
            continue
        assert origin.original is not None
        places = placed(calls(gm, str(node.target)), origin.original)
        fit = _fit(gm, origin)
        layers[origin.name] = places if isinstance(places, Reason) else Decomposed(places, origin.ranks, fit)
    return layers


def _why_not(gm: fx.GraphModule, origin: Provenance) -> Reason | None:
    """Return why the ranks of a decomposed layer cannot be moved, if they cannot."""
    recorded = [p for node in gm.graph.nodes if (p := provenance(node)) is not None and p.name == origin.name]
    if any(p.entangled for p in recorded):
        return _ENTANGLED
    if any(p.role == "branch" for p in recorded):
        return _BRANCHED
    return _NO_ORIGINAL if origin.original is None else None


def _fit(gm: fx.GraphModule, origin: Provenance) -> Fit | None:
    """Return what the layer's present factors were fitted to, if they were."""
    if not origin.fitted or origin.original is None:
        return None
    measured = statistics_of(n for n in gm.graph.nodes if (p := provenance(n)) is not None and p.name == origin.name)
    return measured.fit(origin.original) if measured is not None else None


def _apply(gm: fx.GraphModule, name: str, layer: Decomposed, ranks: Ranks | None, timings: dict[str, Timing]) -> None:
    if ranks is None:
        restore(gm, name, latency=timings[ORIGINAL].seconds)
        return
    seconds = timings[ranks_text(ranks)].seconds
    parts: nn.Sequential | None = None
    if ranks != layer.ranks:
        parts, error = decomposed(layer.original, ranks, fit=layer.fit)
        worst = channel_error(layer.original, parts, layer.fit)
        gm.set_submodule(name, parts)
    for role, _ in gm.get_submodule(name).named_children():
        for node in calls(gm, f"{name}.{role}"):
            p = provenance(node)
            assert p is not None
            provenance.record(node, changed(p, latency=seconds))
            if parts is not None:
                provenance.record(node, changed(p, latency=seconds, ranks=ranks, error=error, channel_error=worst))
                infer_shape(node, parts.get_submodule(p.role))


def _note(layer: Decomposed, chosen: Ranks | None, timings: dict[str, Timing]) -> str:
    before = timings[ranks_text(layer.ranks)]
    if chosen is None:
        return f"original back: rank {ranks_text(layer.ranks)} takes {before.ratio:.2f} of its time"
    after = timings[ranks_text(chosen)]
    return (
        f"rank {ranks_text(layer.ranks)} → {ranks_text(chosen)}: "
        f"{before.ratio:.2f} → {after.ratio:.2f} of the original's time"
    )
