"""allocate: one form for each layer, all at once, under a budget for the whole model.

Each layer is to take one of its forms: the original, its factors at some ranks, or one of the interpolative merges
that it takes part in. With the predicted error e of each (fxlrd/allocation/choices.py, fxlrd/allocation/merges.py) and
its cost c in parameters, FLOPs or measured latency (fxlrd/allocation/measures.py),

    minimise Σ e   subject to   Σ c ≤ budget            (fxlrd/allocation/problem.py)

A merge changes several layers, and a layer may be cut on both sides. Under a budget of latency the model is timed in
the form of a plan, side by side with the original, until what is measured is what was asked for
(fxlrd/allocation/search.py).

The graph is not changed: `merge` and `decompose` carry the plan out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from fxlrd.allocation.choices import Choice
from fxlrd.allocation.factored import Factored
from fxlrd.allocation.measured import goals_of, measured, trial_of_group, trial_of_layer
from fxlrd.allocation.measures import Flops, Measure, Params, curve_of, forms_of, measure_of
from fxlrd.allocation.merges import Merging, mergings
from fxlrd.allocation.problem import Problem, within
from fxlrd.allocation.search import NOTHING
from fxlrd.allocation.trials import Trial
from fxlrd.allocation.uncut import what_stands
from fxlrd.budget import Budget
from fxlrd.calibration.holdout import Disabled, Holdout, TooFew, held_out
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.guards import MERGED
from fxlrd.graph.layer import Layer, layers_of
from fxlrd.layers.forms import depthwise_reason
from fxlrd.passes._priced import Priced
from fxlrd.passes.contract import PassResult, Skip, names
from fxlrd.passes.driver import Run, start
from fxlrd.progress import Progress, quiet
from fxlrd.timing.clock import Timer, compare
from fxlrd.timing.inductor import Compile
from fxlrd.timing.stopwatch import Stopwatch


@dataclass(frozen=True)
class Allocate:
    """Choose every layer's form under one budget: ``params``, ``flops`` or ``latency``, as a share of the original's.

    ``layers`` is a budget of the parameters of the layers that may be cut, without all others (`fxlrd.Budget`).
    ``skip`` takes names and globs of layers to leave alone. ``merge=False`` leaves interpolative merges out of the
    choices. For latency: ``compile`` times under Inductor with frozen weights, ``seconds`` bounds the timing of one
    layer signature, ``cache=False`` neither reads nor writes timings on disk. Predicted errors mean most after
    ``calibrate{effects=256}``. ``measured`` is the number of inputs, of those that `Calibrate` held out, on which they
    are measured too (fxlrd/allocation/measured.py): fewer are used of a large model; 0 is none. Raises FxlrdError for a
    budget out of reach, saying what is within.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    params: float | None = None
    flops: float | None = None
    latency: float | None = None
    layers: float | None = None
    skip: tuple[str, ...] = ()
    merge: bool = True
    compile: Compile = False
    measured: int = 0
    seconds: float = 1.0
    cache: bool = True
    timer: Timer = field(default=compare, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("params", "flops", "latency", "layers"):
            object.__setattr__(self, name, getattr(self, name) or None)  # 0 is as good as not given
        object.__setattr__(self, "skip", names(self.skip))
        _ = self.budget  # which checks them
        if not isinstance(self.measured, int) or self.measured < 0:
            raise FxlrdError(f"allocate: measured={self.measured} is no number of inputs")
        if not self.seconds > 0:
            raise FxlrdError(f"allocate: seconds={self.seconds} leaves no time to measure")

    @property
    def budget(self) -> Budget:
        """The budget asked for."""
        return Budget(self.params, self.flops, self.latency, self.layers)

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with a plan on it. Nodes need shapes: capture or propagate first."""
        return self.priced(gm, [self.budget], progress).within(self.budget, progress)

    def priced(self, gm: fx.GraphModule, budgets: Sequence[Budget], progress: Progress = quiet) -> Priced:
        """Return the forms of all layers with their errors and costs, to choose from within each of ``budgets``.

        ``budgets`` are of the measure of this pass's own. Predicted errors are measured at both ends of their range.
        """
        run = start(self, gm, progress, named=self.skip)
        measure = measure_of(self.budget, Stopwatch(self.compile, self.seconds, self.cache, self.timer))
        held_out = self._held_out(run)
        goals = None if held_out is None else goals_of([self._share_of_layers(run, measure, each) for each in budgets])
        items, trials = self._items(run, measure, goals)
        groups = self._mergings(run, [*items], measure) if self.merge else {}
        if held_out is not None and goals is not None:
            trials += [trial_of_group(run.gm, name, merging, goals) for name, merging in groups.items()]
            items, groups = measured(run.gm, items, groups, trials, held_out, self.measured, progress)
        uncut = self._uncut(run, items, groups)
        if not items:
            raise FxlrdError(f"{NOTHING}{uncut}")
        biases = {name: measure.bias(run.gm.get_submodule(name)) for name in items}
        problem = Problem(items, groups, biases)
        total = measure.total(run.gm, problem.original)
        return Priced(run, measure, replace(problem, groups=within(groups, total - problem.original)), total, uncut)

    def _held_out(self, run: Run) -> Holdout | None:
        """Return the inputs to measure on, or None where errors are only predicted."""
        if not self.measured:
            return None
        inputs = held_out(run.gm)
        if isinstance(inputs, TooFew):
            run.warnings.append(f"{run.label}: errors are predicted, not measured: {inputs.reason}")
        if isinstance(inputs, Disabled):
            raise FxlrdError(f"{run.label}: measured={self.measured} needs calibrate{{holdout=true}} before it")
        return inputs if isinstance(inputs, Holdout) else None

    def _share_of_layers(self, run: Run, measure: Measure, budget: Budget) -> float:
        """Return the share of the layers' cost that a computed budget leaves, if nothing else is cut."""
        if not isinstance(measure, Params | Flops):
            return budget.share
        layers = [layer for layer in layers_of(run.gm) if self._left_alone(layer) is None]
        original = sum(measure.original(layer) for layer in layers)
        outside = measure.total(run.gm, original) - original
        left = (budget.share * (original + outside) - outside) / max(original, 1.0)
        return min(0.95, max(0.05, left))

    def _items(
        self, run: Run, measure: Measure, goals: Sequence[float] | None
    ) -> tuple[dict[str, list[Choice]], list[Trial]]:
        """Return the forms of the layers that may be changed; of those that only a merge may cut, the original only.

        These are the stem and layers that are merged already.

        With ``goals``, shares of their cost to measure errors at, also the trials for that.
        """
        items: dict[str, list[Choice]] = {}
        trials: list[Trial] = []
        factored = Factored()

        def visit(layer: Layer) -> Skip | None:
            reason = self._left_alone(layer)
            if reason is None or reason.code in ("stem", MERGED.code):
                curve = curve_of(layer) if reason is None else None
                forms = forms_of(layer, measure, curve)
                if isinstance(forms, Reason):
                    reason = forms
                else:
                    if goals is not None and curve is not None and len(forms) > 1:
                        trials.append(trial_of_layer(layer, forms, goals, factored))
                        if curve.gram is not None and curve.fit is not None:
                            factored.know(layer, curve.gram)
                    items[layer.name] = forms
            return None if reason is None else Skip(layer.name, reason)

        run.each(layers_of(run.gm), visit)
        return items, trials

    def _mergings(self, run: Run, names: Sequence[str], measure: Measure) -> dict[str, Merging]:
        """Return the groups that may be merged; a warning names those whose algebra fails."""
        priced = mergings(run.gm, names, measure, self.skip, run.progress)
        failed = {name: merging for name, merging in priced.items() if isinstance(merging, Reason)}
        run.warnings += [f"{run.label}: {name}: its channels are not merged: {why}" for name, why in failed.items()]
        return {name: merging for name, merging in priced.items() if not isinstance(merging, Reason)}

    def _uncut(self, run: Run, items: Mapping[str, Sequence[Choice]], groups: Mapping[str, Merging]) -> str:
        """Return in words which weights have no smaller form, and are in no group that may be merged."""
        merged = {name for merging in groups.values() for name in merging.cut}
        cuttable = [name for name, forms in items.items() if len(forms) > 1 or name in merged]
        reasons = {skip.name: skip.reason for skip in run.skipped}
        return what_stands(run.gm, cuttable, reasons, tables=self.budget.measure == "params")

    def _left_alone(self, layer: Layer) -> Reason | None:
        reason = MERGED if layer.role == "merged" else layer.why_left_alone(self.skip)
        if reason is None or reason.code == "stem":
            return depthwise_reason(layer.module) or reason
        return reason
