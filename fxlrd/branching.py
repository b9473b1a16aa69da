"""A pipeline within several budgets: what they have in common is done once, the rest for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from fxlrd.budget import Budget
from fxlrd.calibration.holdout import Holdout, held_out, let_go
from fxlrd.calibration.moments import forget_statistics
from fxlrd.errors import BudgetError, FxlrdError
from fxlrd.passes import Allocate
from fxlrd.passes._priced import Priced
from fxlrd.passes.contract import PassResult
from fxlrd.pipeline import Execution, Pipeline, PipelineResult
from fxlrd.progress import Progress, steps_of
from fxlrd.request import with_budget

_ALLOCATING = "allocate: timing the model"


@dataclass(frozen=True)
class Run:
    """What the passes made of a model within one budget.

    Attributes:
        result: the graph and the ledger.
        passes: the passes with the budget in them.
        error: the relative error of the outputs; None if nothing was verified.
        error_on: the inputs that it was measured on, in words.
    """

    result: PipelineResult
    passes: Pipeline
    error: float | None
    error_on: str


def carry_out(
    passes: Pipeline, original: fx.GraphModule, budgets: Sequence[Budget], *, verify: bool, progress: Progress[Any]
) -> tuple[dict[Budget, Run], dict[Budget, str]]:
    """Return what ``passes`` make of a graph within each budget, and why some of the budgets cannot be met.

    ``budgets`` of one measure stand together. Raises BudgetError if none can be met.
    """
    at = _allocate_at(passes)
    common = Execution(passes.passes, original, verify=verify)
    for step in passes.passes[:at]:
        common.carry_out(step, step, progress)
    runs: dict[Budget, Run] = {}
    missed: dict[Budget, str] = {}
    for _, alike in groupby(budgets, key=lambda budget: budget.measure):
        same_measure = list(alike)
        allocate = with_budget(passes, same_measure[0]).passes[at]
        assert isinstance(allocate, Allocate)
        priced = allocate.priced(common.graph_module, same_measure, progress)
        for budget in same_measure:
            try:
                runs[budget] = _within(budget, passes, at, common.branch(), priced, progress)
            except BudgetError as error:
                missed[budget] = str(error)
    if not runs:
        raise BudgetError(next(iter(missed.values())))
    return runs, missed


def labels(passes: Pipeline, budgets: Sequence[Budget]) -> list[str]:
    """Return the labels of the steps of `carry_out`, in order."""
    at = _allocate_at(passes)
    head, tail = Pipeline(passes.passes[:at]).labels, Pipeline(passes.passes[at + 1 :]).labels
    priced = [step for step in steps_of("allocate") if step != _ALLOCATING]
    return [*head, *priced, *(step for _ in budgets for step in [_ALLOCATING, *tail])]


def _allocate_at(passes: Pipeline) -> int:
    """Return the place of the one pass that spends the budget."""
    at = [i for i, step in enumerate(passes.passes) if isinstance(step, Allocate)]
    if len(at) != 1:
        raise FxlrdError(f"frontier: one allocate spends the budget, and {passes} has {len(at)}")
    return at[0]


def _within(
    budget: Budget, passes: Pipeline, at: int, execution: Execution, priced: Priced, progress: Progress[Any]
) -> Run:
    """Carry out the passes from the one that spends the budget on."""

    def choose(gm: fx.GraphModule, progress: Progress[Any]) -> PassResult:
        return priced.within(budget, progress)

    own = with_budget(passes, budget)
    execution.carry_out(own.passes[at], choose, progress)
    for step in own.passes[at + 1 :]:
        execution.carry_out(step, step, progress)
    return _finished(execution.result(), own)


def _finished(result: PipelineResult, passes: Pipeline) -> Run:
    """Return the run with its error measured; what was for fitting only is let go."""
    gm = result.graph_module
    inputs = held_out(gm)
    error, error_on = result.ledger[-1].relative_error, "the example inputs"
    if isinstance(inputs, Holdout):
        error, error_on = inputs.error(gm), "held-out calibration inputs"
    let_go(gm)
    forget_statistics(gm)
    return Run(result, passes, error, error_on)
