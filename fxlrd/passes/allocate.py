"""allocate: one form for each layer, all at once, under a budget for the whole model.

Each layer is to take one of its forms: the original, its factors at some ranks, or one of the interpolative merges
that it takes part in. With the predicted error e of each (fxlrd/allocation/choices.py, fxlrd/allocation/merges.py) and
its cost c,

    minimise Σ e   subject to   Σ c ≤ budget            (fxlrd/allocation/knapsack.py)

A merge changes several layers, and a layer may be cut on both sides. Which channel groups to merge is found by
coordinate descent on Σ e + λ·Σ c for a series of λ; for each outcome the other layers' forms are the exact solution of
the knapsack, and the best outcome is taken. Parameters and FLOPs are computed. Latency is that of each layer's form,
timed on this device as `snap` does, plus what is left of the whole model's; then the whole model is timed in that form,
side by side with the original, and the budget moved until what is measured is what was asked for.

The graph is not changed: `merge` and `decompose` carry the plan out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import ClassVar

from torch import fx, nn

from fxlrd.allocation.choices import Choice, Curve, candidate_ranks, flops, pareto
from fxlrd.allocation.merges import curve, mergeable, readers
from fxlrd.allocation.plan import Plan, leave, sketch
from fxlrd.allocation.problem import Merging, Problem
from fxlrd.budget import Budget
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph import cost
from fxlrd.graph.captured import Captured, captured, captured_or_bare, runnable
from fxlrd.graph.facts import FACTORS, provenance, statistics, times
from fxlrd.graph.guards import FACTOR, is_stem, matches, skip_reason, stem_reason, why_not_replaceable
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.forms import depthwise_reason, parameters, ranks_text
from fxlrd.layers.kinds import as_layer, channels_per_group
from fxlrd.passes.contract import PassResult, Skip, names
from fxlrd.passes.driver import Run, start
from fxlrd.progress import Progress, quiet
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.groups import time_group
from fxlrd.timing.layers import ORIGINAL, placed, time_ranks
from fxlrd.timing.models import time_models
from fxlrd.timing.stopwatch import Stopwatch

WITHIN = 0.02
"""Share of a latency budget by which the measured latency may differ from it."""
_TIMED = 8
"""Forms of one layer that are timed."""
_ROUNDS = 6


@dataclass(frozen=True)
class Allocate:
    """Choose every layer's form under one budget: ``params``, ``flops`` or ``latency``, as a share of the original's.

    ``skip`` takes names and globs of layers to leave alone. ``merge=False`` leaves interpolative merges out of the
    choices. For latency: ``compile`` times under Inductor with frozen weights, ``seconds`` bounds the timing of one
    layer signature, ``cache=False`` neither reads nor writes timings on disk. Predicted errors mean most after
    ``calibrate{effects=256}``. Raises FxlrdError for a budget out of reach, saying what is within.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    params: float = 0.0
    flops: float = 0.0
    latency: float = 0.0
    skip: tuple[str, ...] = ()
    merge: bool = True
    compile: bool = False
    seconds: float = 1.0
    cache: bool = True
    timer: Timer = field(default=compare, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", names(self.skip))
        self.budget  # noqa: B018 - it checks itself
        if not self.seconds > 0:
            raise FxlrdError(f"allocate: seconds={self.seconds} leaves no time to measure")

    @property
    def budget(self) -> Budget:
        """The budget asked for."""
        given = {"params": self.params, "flops": self.flops, "latency": self.latency}
        return Budget(**{name: value for name, value in given.items() if value != 0})

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with a plan on it. Nodes need shapes: capture or propagate first."""
        run = start(self, gm, progress, named=self.skip)
        problem = self.problem(run)
        if not problem.items:
            raise FxlrdError(_NOTHING)
        plan, note = self._within_latency(run.gm, problem, progress) if self.latency else self._within(run.gm, problem)
        leave(run.gm, plan)
        free = [n for n in problem.items if n not in plan.ranks and n not in problem.touched(plan.kept)]
        reported = {skip.name for skip in run.skipped}
        run.skipped += [Skip(n, _NOT_WORTH_IT) for n in free if n not in reported]
        return run.result(note, problem.timings)

    # -- the choices

    def problem(self, run: Run) -> Problem:
        """Return what there is to choose from, for each layer and group of channels; the run skips the other layers."""
        problem = Problem(Stopwatch(self.compile, self.seconds, self.cache, self.timer))
        guards = why_not_replaceable(run.gm)
        run.each(layers(run.gm), lambda name: self._add_layer(run.gm, name, problem, guards[name]))
        if self.merge:
            self._add_groups(run.gm, problem, run.progress)
        return problem

    def _add_layer(self, gm: fx.GraphModule, name: str, problem: Problem, guard: Reason | None) -> Skip | None:
        """Add a layer's forms to the problem, or return why it has none to choose from. The stem stays, at its cost."""
        module = gm.get_submodule(name)
        reason = self._left_alone(gm, name, module, guard)
        if reason is None or reason.code == "stem":
            item = self._item(gm, name, module, problem, alone=reason is not None)
            if isinstance(item, Reason):
                reason = item
            else:
                problem.items[name] = item
        return None if reason is None else Skip(name, reason)

    def _left_alone(self, gm: fx.GraphModule, name: str, module: nn.Module, guard: Reason | None) -> Reason | None:
        p = provenance(calls(gm, name)[0])
        if p is not None and p.role in FACTORS:
            return FACTOR
        if guard is not None:
            return guard
        if (pattern := matches(name, self.skip)) is not None:
            return skip_reason(pattern)
        if (reason := depthwise_reason(module)) is not None:
            return reason
        return stem_reason(module) if is_stem(gm, name, module) else None

    def _item(
        self,
        gm: fx.GraphModule,
        name: str,
        module: nn.Module,
        problem: Problem,
        alone: bool,
    ) -> list[Choice] | Reason:
        """Return the layer's forms that no other beats, the original last, or why they cannot be told."""
        nodes = calls(gm, name)
        found = statistics_of(nodes)
        fit = found.fit(module) if found is not None else None
        _, c_out, groups = channels_per_group(module)
        bias = c_out * groups * (as_layer(module).bias is not None)
        if self.params:
            original = Choice(None, 0.0, as_layer(module).weight.numel() + bias)
        elif self.flops:
            original = Choice(None, 0.0, sum(flops(n, module, None) for n in nodes))
        else:
            original = Choice(None, 0.0, 0.0)
        candidates = [] if alone else candidate_ranks(module, multiple=_multiple(module) if self.latency else 1)
        errors = Curve(module, fit) if candidates else None
        priced = [Choice(r, errors.error(r), 0.0) for r in candidates if errors is not None]
        if self.params:
            added = c_out * groups if fit is not None else bias
            priced = [changed(c, cost=parameters(module, c.ranks) + added) for c in priced if c.ranks]
        elif self.flops:
            priced = [changed(c, cost=sum(flops(n, module, c.ranks) for n in nodes)) for c in priced]
        else:
            where = placed(nodes[0], module)
            if isinstance(where, Reason):
                return where
            few = [changed(c, cost=parameters(module, c.ranks)) for c in priced if c.ranks]
            few = pareto(few, _TIMED)
            timings = time_ranks(where, [c.ranks for c in few if c.ranks], problem.stopwatch)
            problem.timings[name] = timings
            whole = timings[ORIGINAL].seconds * sum(times(n) for n in nodes)
            original = changed(original, cost=whole)
            priced = [changed(c, cost=whole * timings[ranks_text(c.ranks)].ratio) for c in few if c.ranks]
        return [*pareto(c for c in priced if c.cost < original.cost), original]

    def _add_groups(self, gm: fx.GraphModule, problem: Problem, progress: Progress) -> None:
        reasons = why_not_replaceable(gm, norms=True)
        done: set[fx.Node] = set()
        for name in progress(list(problem.items), "allocate: merges"):
            node = calls(gm, name)[0]
            if node in done:
                continue
            whole = mergeable(gm, node, reasons, self.skip)
            if isinstance(whole, Reason) or isinstance(known := readers(gm, whole), Reason):
                continue
            done.update(whole.producers)
            if not all(str(n.target) in problem.items for n in (*whole.producers, *(c.node for c in whole.consumers))):
                continue
            kept = _kept(whole.channels)
            if not kept:
                continue
            errors = curve(known, kept)
            if any(statistics(r.consumer.node) is None for r in known):
                continue
            shares = {r: r / whole.channels for r in kept}
            if self.latency:
                ranks = [whole.channels, *kept]
                timings = time_group(gm, whole, ranks, problem.stopwatch)
                shares = {r: timings[str(r)].ratio / timings[str(whole.channels)].ratio for r in kept}
            options = {r: (error, shares[r]) for r, error in zip(kept, errors, strict=True)}
            problem.groups[name] = Merging(whole, options)

    # -- the budget

    def _within(self, gm: fx.GraphModule, problem: Problem) -> tuple[Plan, str]:
        """Return the best plan for a budget of parameters or FLOPs."""
        outside = captured_or_bare(gm).outside
        total = cost.params(gm) + outside.params if self.params else cost.flops(gm) + outside.flops
        if not total:
            raise FxlrdError("allocate: the model's FLOPs are not known: give example inputs")
        fixed = total - problem.original()
        plan = problem.best(self.budget.share * total - fixed)
        if plan is None:
            least = (problem.least() + fixed) / total
            if least > 0.999:
                raise FxlrdError(_NOTHING)
            raise FxlrdError(
                f"allocate: {self.budget.measure}={self.budget.share:g} is out of reach: the cheapest forms leave "
                f"{_up(least)} of it; ask for that or more"
            )
        spent = (problem.cost(plan) + fixed) / total
        return plan, f"{spent:.3f} of {self.budget.measure}; {problem.note(plan)}"

    def _within_latency(self, gm: fx.GraphModule, problem: Problem, progress: Progress) -> tuple[Plan, str]:
        """Return the best plan whose measured latency is the budget's share of the original's."""
        known = captured(gm)
        if known is None:
            raise FxlrdError("allocate: a latency budget needs a captured model: fxlrd.capture(model, example_inputs)")
        groups = {name: merging.whole for name, merging in problem.groups.items()}
        share, least = self.latency, problem.least() * (1 + 1e-9)  # within reach whatever way it is summed up
        whole = self._timed({"model": gm}, known)["model"].seconds
        fixed = whole - problem.original()  # norms, activations, additions, and what caches do
        measured: list[tuple[float, float, Plan]] = []  # (budget for the layers, measured share, plan)
        target = share * whole - fixed
        for _ in progress(range(_ROUNDS), "allocate: timing the whole"):
            plan = problem.best(max(target, least))
            assert plan is not None
            ratio = self._timed({"before": gm, "after": sketch(gm, plan, groups)}, known)["after"].ratio
            measured.append((max(target, least), ratio, plan))
            if abs(ratio / share - 1) <= WITHIN / 2 or (target <= least and ratio > share):
                break
            target = _next(measured, share, whole)
        fits = [m for m in measured if m[1] <= share * (1 + WITHIN)]
        if not fits:
            reached = min(m[1] for m in measured)
            if reached > 0.999:
                raise FxlrdError(
                    f"allocate: latency={share:g} is out of reach: no form of its layers is faster here; "
                    "try a larger batch, or a budget of params or flops"
                )
            raise FxlrdError(
                f"allocate: latency={share:g} is out of reach: the fastest forms take {_up(reached)} of the original's "
                "time here; ask for that or more, or another batch size"
            )
        _, ratio, plan = max(fits, key=lambda m: m[1])
        return plan, f"{ratio:.3f} of latency, measured; {problem.note(plan)}"

    def _timed(self, models: Mapping[str, fx.GraphModule], known: Captured) -> dict[str, Timing]:
        return time_models(
            {name: runnable(gm) for name, gm in models.items()},
            known.inputs,
            under_inductor=self.compile,
            seconds=3.0,
            timer=self.timer,
        )


_NOT_WORTH_IT = Reason("not-worth-it", "no cheaper form is worth its error")
_NOTHING = "allocate: nothing in it can be made cheaper: no layer is left that has a smaller form"


def _multiple(module: nn.Module) -> int:
    """Return the multiple that the ranks of timed forms go in."""
    c_in, c_out, groups = channels_per_group(module)
    return 16 if min(c_in, c_out) * groups >= 256 else 8


def _kept(count: int) -> list[int]:
    """Return the numbers of channels that a group of ``count`` may keep, ascending."""
    step = 16 if count >= 256 else 8 if count >= 64 else 4
    found = list(range(step, count, step))
    stride = max(1, math.ceil(len(found) / 10))
    return found[::-1][::stride][::-1]


def _up(share: float) -> str:
    return f"{math.ceil(share * 1000) / 1000:.3f}"


def _next(measured: Sequence[tuple[float, float, Plan]], share: float, whole: float) -> float:
    """Return the budget to try next: between the closest ones on either side, or as far on as the last one missed."""
    below = [(m[1], m[0]) for m in measured if m[1] <= share]
    above = [(m[1], m[0]) for m in measured if m[1] > share]
    if below and above:
        (r0, b0), (r1, b1) = max(below), min(above)
        return b0 + (b1 - b0) * (share - r0) / (r1 - r0) if r1 > r0 else (b0 + b1) / 2
    budget, ratio, _ = measured[-1]
    return budget + (share - ratio) * whole
