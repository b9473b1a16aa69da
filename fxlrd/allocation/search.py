"""The best plan for a budget: in one step where costs are computed, in a few where the model must be timed.

The latency of a model is not the sum of its layers' latencies. So the model is timed in the form of a plan, side by
side with the original, and the budget of the layers is moved until the measured share is the one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import fx

from fxlrd.allocation.measures import Latency, Measure, Params
from fxlrd.allocation.plan import Plan, sketch
from fxlrd.allocation.problem import Problem
from fxlrd.budget import Budget
from fxlrd.errors import BudgetError
from fxlrd.progress import Progress

WITHIN = 0.02
"""Share of a latency budget by which the measured latency may differ from it."""
NOTHING = "allocate: nothing in it can be made cheaper: no layer is left that has a smaller form"
TOLERANCE = 0.1
"""Share by which the layers' times may add up to more than the model's, as they are timed alone."""
_ROUNDS = 6
_CERTAIN = 0.999
"""A share of the original's cost above which nothing is gained."""


class Outcome(NamedTuple):
    """The plan for a budget, the share of the original's cost that it spends, in words, and what is in doubt."""

    plan: Plan
    spent: str
    warnings: tuple[str, ...] = ()


class Attempt(NamedTuple):
    """A plan for a budget of the layers, and the latency measured under it, as a share of the original's."""

    budget: float
    share: float
    plan: Plan


def best_plan(
    gm: fx.GraphModule,
    problem: Problem,
    measure: Measure,
    budget: Budget,
    progress: Progress,
    *,
    total: float,
    uncut: str = "",
    attempts: list[Attempt] | None = None,
) -> Outcome:
    """Return the best plan for the model within a budget.

    ``total`` is the model's cost. ``uncut`` says what stands in the way of a computed budget, to end an error with;
    ``attempts`` are those of other latency budgets, and those of this one are added.
    Raises BudgetError for a budget out of reach, saying what is within.
    """
    if not isinstance(measure, Latency):
        plan, share = plan_computed(problem, total, budget, uncut)
        return Outcome(plan, f"{share:.3f} of {budget.measure}{_of_params(gm, problem, plan, budget)}")
    groups = {name: merging.group for name, merging in problem.groups.items()}
    plan, share = plan_measured(
        problem, total, budget.share, lambda plan: measure.ratio(gm, sketch(gm, plan, groups)), progress, attempts
    )
    doubts = []
    if problem.original > (1 + TOLERANCE) * total:
        doubts.append(
            f"allocate: the layers, timed alone, add up to {problem.original / total:.0%} of the model's time: there "
            "was other load, or Inductor fuses over layers; the plan is measured, but may not be the best"
        )
    return Outcome(plan, f"{share:.3f} of latency, measured", tuple(doubts))


def _of_params(gm: fx.GraphModule, problem: Problem, plan: Plan, budget: Budget) -> str:
    """Return the share of the model's parameters, in words, that a share of its layers' comes to."""
    if budget.measure != "layers":
        return ""
    total = Params().total(gm, problem.original)
    return f" ({(problem.cost(plan) + total - problem.original) / total:.3f} of params)"


def plan_computed(problem: Problem, total: float, budget: Budget, uncut: str = "") -> tuple[Plan, float]:
    """Return the best plan for a budget of parameters or FLOPs, and the share of ``total``, the model's, that it costs.

    ``uncut`` says what stands in the way, to end an error with.
    Raises BudgetError for a budget out of reach, saying what is within.
    """
    outside = total - problem.original
    plan = problem.best(budget.share * total - outside)
    if plan is not None:
        return plan, (problem.cost(plan) + outside) / total
    least = (problem.least + outside) / total
    if least > _CERTAIN:
        raise BudgetError(f"{NOTHING}{uncut}")
    raise BudgetError(
        f"allocate: {budget.measure}={budget.share:g} is out of reach: the cheapest forms leave {_up(least)} of it; "
        f"ask for that or more{uncut}"
    )


def plan_measured(
    problem: Problem,
    total: float,
    share: float,
    share_under: Callable[[Plan], float],
    progress: Progress,
    attempts: list[Attempt] | None = None,
) -> tuple[Plan, float]:
    """Return the best plan for a budget of latency, and the share of the original's that was measured under it.

    ``total`` is the latency of the model, ``share_under`` measures it under a plan, relative. ``attempts`` are those
    made for other budgets; those made for this one are added. Raises BudgetError for a budget out of reach, saying what
    is within.
    """
    total = max(total, problem.original)  # layers that are timed alone may add up to more
    least = problem.least + 1e-9 * max(abs(problem.least), problem.original)  # whatever the order of its summands
    target = share * total - (total - problem.original)  # the rest: norms, activations, additions, and what caches do
    attempts = [] if attempts is None else attempts
    if attempts:
        target = _next_budget(attempts, share, total)
    for _ in progress(range(_ROUNDS), "allocate: timing the model"):
        plan = problem.best(max(target, least))
        assert plan is not None
        attempts.append(Attempt(max(target, least), share_under(plan), plan))
        measured = attempts[-1].share
        if abs(measured / share - 1) <= WITHIN / 2 or (target <= least and measured > share):
            break
        target = _next_budget(attempts, share, total)
    fits = [attempt for attempt in attempts if attempt.share <= share * (1 + WITHIN)]
    if fits:
        best = max(fits, key=lambda attempt: attempt.share)
        return best.plan, best.share
    reached = min(attempt.share for attempt in attempts)
    if reached > _CERTAIN:
        raise BudgetError(
            f"allocate: latency={share:g} is out of reach: no form of its layers is faster here; "
            "try a larger batch, or a budget of params or flops"
        )
    raise BudgetError(
        f"allocate: latency={share:g} is out of reach: the fastest forms take {_up(reached)} of the original's "
        "time here; ask for that or more, or another batch size"
    )


def _next_budget(attempts: Sequence[Attempt], share: float, total: float) -> float:
    """Secant step: interpolate between the two that bracket the share, or extrapolate from the last one."""
    below = [(attempt.share, attempt.budget) for attempt in attempts if attempt.share <= share]
    above = [(attempt.share, attempt.budget) for attempt in attempts if attempt.share > share]
    if below and above:
        (low, low_budget), (high, high_budget) = max(below), min(above)
        if high <= low:
            return (low_budget + high_budget) / 2
        return low_budget + (high_budget - low_budget) * (share - low) / (high - low)
    return attempts[-1].budget + (share - attempts[-1].share) * total


def _up(share: float) -> str:
    return f"{math.ceil(share * 1000) / 1000:.3f}"
