"""The forms of all layers with their errors and costs, which hold for any budget; each budget chooses among them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import fx

from fxlrd.allocation.doubts import doubts
from fxlrd.allocation.measures import Measure
from fxlrd.allocation.plan import planned
from fxlrd.allocation.problem import Problem
from fxlrd.allocation.search import Attempt, best_plan
from fxlrd.budget import Budget
from fxlrd.errors import Reason
from fxlrd.graph.facts import job
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls, fork
from fxlrd.passes.contract import PassResult, Skip
from fxlrd.passes.driver import Run
from fxlrd.progress import Progress, quiet

NOT_WORTH_IT = Reason("not-worth-it", "no cheaper form is worth its error")


@dataclass
class Priced:
    """What the layers of a model may become under a budget of one measure.

    Attributes:
        run: the run of `allocate` that found it: the graph, layers left alone, warnings.
        measure: what the budget limits.
        problem: the forms of all layers, the groups that may be merged.
        total: the cost of the model, of which a budget is a share.
        uncut: what has no smaller form, in words, to end an error with.
    """

    run: Run
    measure: Measure
    problem: Problem
    total: float
    uncut: str
    _attempts: list[Attempt] = field(default_factory=list, init=False, repr=False)

    def within(self, budget: Budget, progress: Progress = quiet) -> PassResult:
        """Return a copy of the graph with the best plan for this budget on it, and what `allocate` reports of it.

        Raises BudgetError for a budget out of reach, saying what is within.
        """
        problem, run = self.problem, self._fresh_run()
        plan, spent, warnings = best_plan(
            run.gm,
            problem,
            self.measure,
            budget,
            progress,
            total=self.total,
            uncut=self.uncut,
            attempts=self._attempts,
        )
        predicted = math.sqrt(problem.error(plan))
        channels = {name: problem.groups[name].retained(count) for name, count in plan.retained.items()}
        known = predicted if _effects_measured(run.gm, problem.items) else None
        plan = replace(plan, predicted=known, channels=channels)
        if (shared := job(run.gm)) is not None:
            plan = shared.firsts(plan)
        planned.record(run.gm, plan)
        run.warnings += [*warnings, *doubts(run.gm, problem, plan, budget)]
        cut = problem.cut(plan.retained)
        run.skipped = [skip for skip in run.skipped if skip.name not in cut]  # a stem, with the stream that it begins
        reported = {skip.name for skip in run.skipped}
        unchanged = [name for name in problem.items if name not in plan.ranks and name not in cut]
        run.skipped += [Skip(name, NOT_WORTH_IT) for name in unchanged if name not in reported]
        return run.result(f"{spent}; predicted output error {predicted:.2g}", dict(self.measure.timings))

    def _fresh_run(self) -> Run:
        """Return the run for one budget: another one finds all as it was."""
        run = self.run
        return replace(run, gm=fork(run.gm), skipped=[*run.skipped], warnings=[*run.warnings])


def _effects_measured(gm: fx.GraphModule, names: Iterable[str]) -> bool:
    measured = (statistics_of(calls(gm, name)) for name in names)
    return all(each is not None and each.importance is not None for each in measured)
