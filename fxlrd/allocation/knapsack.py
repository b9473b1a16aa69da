"""The knapsack: one choice for each item at the least error within a budget.

Each of a number of layers has forms, each with a cost and an error. One form of each is chosen such that the sum of
costs stays within a budget and the sum of errors is least: the multiple-choice knapsack problem (Kellerer, Pferschy and
Pisinger 2004, ch. 11). Dynamic programming over the budget in small steps solves it, whatever the shape of the
trade-offs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STEPS = 8192
"""Steps that the budget is spent in, unless told otherwise: costs are rounded up to the next."""


def spend(items: Sequence[Sequence[tuple[float, float]]], budget: float, steps: int = STEPS) -> list[int] | None:
    """Return the index of the choice for each item, or None if even the cheapest ones exceed the budget.

    Each item is a list of (cost, error) to choose one from. The sum of costs never exceeds the budget; the sum of
    errors is the least, but for the rounding of costs. Of choices with equal errors, the most costly one is taken.
    """
    cheapest = [min(cost for cost, _ in item) for item in items]
    spare = budget - sum(cheapest)
    if spare < 0:
        return None
    unit = spare / steps

    def steps_for(extra: float) -> int:
        if extra > unit * (steps + 1):  # also where the unit is 0, or so small that the quotient is infinite
            return steps + 1
        return math.ceil(extra / unit - 1e-9) if unit else 0

    best = np.zeros(steps + 1)  # the least error of the items so far, by the steps that they may spend
    choices = []  # for each item, which choice that takes
    for item, least in zip(items, cheapest, strict=True):
        errors = np.full(steps + 1, np.inf)
        which = np.zeros(steps + 1, dtype=np.int32)
        for i, (cost, error) in sorted(enumerate(item), key=lambda each: each[1][0]):
            taken = steps_for(cost - least)
            if taken > steps:
                continue
            new = best[: steps + 1 - taken] + error
            better = new <= errors[taken:]
            errors[taken:][better] = new[better]
            which[taken:][better] = i
        best = errors
        choices.append(which)
    remaining = steps
    chosen = []
    for item, least, which in zip(reversed(items), reversed(cheapest), reversed(choices), strict=True):
        i = int(which[remaining])
        chosen.append(i)
        remaining -= steps_for(item[i][0] - least)
    return _topped_up(items, chosen[::-1], budget)


def _topped_up(items: Sequence[Sequence[tuple[float, float]]], chosen: list[int], budget: float) -> list[int]:
    """Spend what rounding has left of the budget on whatever lowers the error most."""
    while True:
        remaining = budget - sum(item[i][0] for item, i in zip(items, chosen, strict=True))
        gains = [
            (item[i][1] - error, k, j)
            for k, (item, i) in enumerate(zip(items, chosen, strict=True))
            for j, (cost, error) in enumerate(item)
            if error < item[i][1] and cost - item[i][0] <= remaining
        ]
        if not gains:
            return chosen
        _, k, j = max(gains)
        chosen[k] = j
