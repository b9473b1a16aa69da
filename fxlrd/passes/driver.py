"""The driver of the passes: a copy to rewrite, a loop over what may be rewritten, and the result.

A pass says what it does to one thing:

    def __call__(self, gm, progress=quiet):
        run = start(self, gm, progress, named=self.skip)
        run.each(layers_of(run.gm), lambda layer: self._rewrite(run.gm, layer))
        return run.result()

A pass also declares what it ``needs`` and what it ``leaves`` for later passes, as names of `NEEDS`. The pipeline checks
that of all passes before the first one runs, `start` of a pass that is called alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import fx

from fxlrd.calibration.holdout import reference
from fxlrd.errors import FxlrdError, Reason
from fxlrd.factor.failures import failure
from fxlrd.graph.facts import job
from fxlrd.graph.guards import check_names
from fxlrd.graph.layer import Layer, origin
from fxlrd.graph.surgery import annotate, calls, fork
from fxlrd.passes.contract import Pass, PassResult, Site, Skip
from fxlrd.progress import Progress, quiet
from fxlrd.timing.clock import Timing

T = TypeVar("T")


@dataclass(frozen=True)
class Need:
    """Something that a pass cannot run without: whether a pass has it for a graph module, and the error's words."""

    met: Callable[[Any, fx.GraphModule], bool]
    error: str


NEEDS = {
    "calibration": Need(
        lambda step, gm: step.calibration is not None,
        "no calibration inputs; give calibration= (on the command line --calibration), such as a list of batches",
    ),
    "reference": Need(
        lambda step, gm: reference(gm) is not None,
        "the original network is not known: run calibrate before the passes that rewrite it",
    ),
}
"""What a pass may need, by name: data of its own, and the graph as it was when `Calibrate` ran."""


def check_needs(steps: Sequence[Pass], gm: fx.GraphModule) -> None:
    """Raise FxlrdError for the first pass that needs what neither ``gm`` has nor an earlier pass leaves."""
    available: set[str] = set()
    for step in steps:
        if not hasattr(step, "needs"):  # it declares nothing, so it may leave anything
            return
        for name in step.needs:
            if name not in available and not NEEDS[name].met(step, gm):
                raise FxlrdError(f"{label(step)}: {NEEDS[name].error}")
        available.update(getattr(step, "leaves", ()))


def label(step: Pass) -> str:
    """Return the name of a pass in errors, in the ledger and beside progress bars."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(step).__name__).lower()


@dataclass
class Run:
    """One run of a pass: the graph module that came in, the copy that is rewritten, and what was done so far."""

    label: str
    before: fx.GraphModule
    gm: fx.GraphModule
    progress: Progress[Any]
    sites: list[Site] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def each(self, items: Iterable[T], visit: Callable[[T], Site | Skip | None]) -> None:
        """Visit each item and record what was done; None stands for nothing to report.

        Items are layers, names of modules, call nodes, or tuples that begin with one of these. They are listed first,
        so that a visit may change the graph. Where the algebra of one fails (`failure`), it is skipped with the reason:
        visits factorise before they change anything.
        """
        for item in self.progress(list(items), self.label):
            try:
                outcome = visit(item)
            except Exception as error:
                if (reason := failure(error)) is None:
                    raise
                outcome = Skip(self._name(item), reason)
            self.add(outcome)

    def _name(self, item: Any) -> str:
        """Return the name in the captured model of what an item stands for."""
        first = item[0] if isinstance(item, tuple) else item
        if isinstance(first, Layer):
            return first.origin
        nodes = [first] if isinstance(first, fx.Node) else calls(self.gm, first)
        return origin(nodes[0]) if nodes else str(first)

    def add(self, outcome: Site | Skip | None) -> None:
        """Record what was done at one place."""
        if isinstance(outcome, Site):
            self.sites.append(outcome)
        elif outcome is not None:
            self.skipped.append(outcome)

    def result(self, note: str = "", timings: Mapping[str, Mapping[str, Timing]] | None = None) -> PassResult:
        """Return what the pass did, once its graph is checked and its code is up to date."""
        self.gm.delete_all_unused_submodules()
        self.gm.graph.lint()
        self.gm.recompile()
        return PassResult(self.gm, tuple(self.sites), tuple(self.skipped), note, timings or {}, tuple(self.warnings))

    def undone(self, reason: Reason, note: str = "") -> PassResult:
        """Return the graph module as it came in; every site becomes a skip for this reason."""
        self.gm = fork(self.before)
        self.skipped += [Skip(site.name, reason) for site in self.sites]
        self.sites = []
        return self.result(note)


def start(step: Pass, gm: fx.GraphModule, progress: Progress[Any] = quiet, named: Sequence[str] = ()) -> Run:
    """Return the run of a pass on a copy of ``gm``.

    Raises FxlrdError for what is no captured graph module, for a need that is not met (`NEEDS`), and for a name or glob
    in ``named`` that fits no layer.
    """
    copy = fork(gm)
    check_needs((step,), gm)
    annotate(copy)
    check_names(copy, named)
    return Run(label(step), gm, copy, progress)


def in_turns(gm: fx.GraphModule, works: Sequence[Callable[[], T]]) -> Iterator[Callable[[], T]]:
    """Yield the pieces of work in order; if processes share the compression, calls for what one of them has made."""
    shared = job(gm)
    return iter(works) if shared is None else shared.in_turns(works)
