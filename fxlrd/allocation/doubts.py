"""What a user should know of a plan: parameters that no plan reaches, and outputs that no layer reaches."""

from __future__ import annotations

import math

from torch import fx, nn

from fxlrd.allocation.choices import NEGLIGIBLE
from fxlrd.allocation.plan import Plan, planned
from fxlrd.allocation.problem import Problem
from fxlrd.budget import Budget
from fxlrd.calibration.holdout import INCOMPARABLE, Holdout, held_out
from fxlrd.graph import cost
from fxlrd.graph.captured import captured_or_bare

_MANY = 0.1
"""Share of the parameters from which on embeddings are worth a word."""


def doubts(gm: fx.GraphModule, problem: Problem, plan: Plan, budget: Budget) -> list[str]:
    """Return the warnings for the plan that was chosen within a budget."""
    warnings = []
    share = embedded(gm)
    if budget.measure == "params" and share >= _MANY:
        left = problem.cost(plan) / problem.original
        warnings.append(
            f"allocate: {share:.0%} of the parameters are embeddings, which stay as they are: "
            f"params={budget.share:g} leaves {left:.2f} of the layers that may be cut; layers= counts those alone"
        )
    if not matters(problem):
        warnings.append(
            "allocate: the output does not depend on the layers, as if the model were not trained; "
            "the forms nearest to the original layers are chosen"
        )
    return warnings


def embedded(gm: fx.GraphModule) -> float:
    """Return the share of the model's parameters that its embeddings hold, those of a tied head included."""
    model = captured_or_bare(gm).model or gm
    tables = {id(p): p.numel() for m in model.modules() if isinstance(m, _EMBEDDINGS) for p in m.parameters()}
    return sum(tables.values()) / max(cost.params(model), 1)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def matters(problem: Problem) -> bool:
    """Whether any form of any layer is predicted to change the model's output."""
    return any(choice.error > 2 * NEGLIGIBLE for item in problem.items.values() for choice in item)


_TIMES = 3.0
"""How many times its prediction a measured error may be without a word."""

_SMALL = 1e-3
"""Errors that are not worth a word whatever was predicted."""


def doubt_of_plan(gm: fx.GraphModule) -> str | None:
    """Return a warning where a plan that was carried out moves the outputs on held-out inputs far beyond prediction."""
    plan, inputs = planned(gm), held_out(gm)
    if plan is None or not plan.predicted or not isinstance(inputs, Holdout):
        return None
    error = inputs.error(gm)
    if error <= max(_TIMES * plan.predicted, _SMALL):
        return None
    if math.isinf(error):
        return INCOMPARABLE
    return (
        f"the output error on held-out inputs is {error:.2g}, {error / plan.predicted:.1f} times what allocate "
        f"predicted ({plan.predicted:.2g}): give more calibration inputs or a larger budget"
    )
