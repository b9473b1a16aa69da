"""What a compressed model may cost, and the best way of spending that.

One form is to be chosen for each of a number of layers, each with a cost and an error, so that the sum of errors is
least and the sum of costs within a budget: the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger
2004, ch. 11). Dynamic programming over the budget in small steps solves it, whatever the shape of the trade-offs.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fxlrd.errors import FxlrdError, unknown

STEPS = 8192
"""Steps that the budget is spent in: costs are rounded up to the next."""


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost, as a fraction of the original: one of parameters, FLOPs, or latency
    measured on this device. Raises FxlrdError unless exactly one is given and lies between 0 and 1.
    """

    params: float | None = None
    flops: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise FxlrdError(f"budget: give one of params, flops or latency, such as Budget(latency=0.5); got {found}")
        if not is_share(self.share):
            raise FxlrdError(
                f"budget: {self.measure}={self.share!r} is no fraction of the original between 0 and 1, such as 0.5"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read the text form, such as latency=0.5."""
        measure, _, share = str(text).partition("=")
        known = [f.name for f in fields(cls)]
        if measure not in known:
            raise unknown("budget", measure, known)
        try:
            return cls(**{measure: float(share)})
        except ValueError as error:
            said = str(error) if isinstance(error, FxlrdError) else f"{share!r} is no number"
            raise FxlrdError(f"budget {text}: {said.removeprefix('budget: ')}") from error

    @property
    def measure(self) -> str:
        """What is limited: params, flops or latency."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def share(self) -> float:
        """The fraction of the original that it is limited to."""
        found: float = getattr(self, self.measure)
        return found


def is_share(value: object) -> bool:
    """Whether the value is a number between 0 and 1, both excluded."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < 1


def spend(items: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int] | None:
    """Return the index of the choice for each item, or None if even the cheapest ones exceed the budget.

    Each item is a list of (cost, error) to choose one from. The sum of costs never exceeds the budget; the sum of
    errors is the least, but for the rounding of costs.
    """
    cheapest = [min(cost for cost, _ in item) for item in items]
    spare = budget - sum(cheapest)
    if spare < 0:
        return None
    unit = spare / STEPS

    def steps_for(extra: float) -> int:
        if extra > unit * (STEPS + 1):  # also where the unit is 0, or so small that the quotient is infinite
            return STEPS + 1
        return math.ceil(extra / unit - 1e-9) if unit else 0

    best = np.zeros(STEPS + 1)  # the least error for what is left, by what has been spent
    taken = []
    for item, least in zip(items, cheapest, strict=True):
        found = np.full(STEPS + 1, np.inf)
        which = np.zeros(STEPS + 1, dtype=np.int32)
        for i, (cost, error) in enumerate(item):
            steps = steps_for(cost - least)
            if steps > STEPS:
                continue
            new = best[: STEPS + 1 - steps] + error
            better = new < found[steps:]
            found[steps:][better] = new[better]
            which[steps:][better] = i
        best = found
        taken.append(which)
    left = STEPS
    chosen = []
    for item, least, which in zip(reversed(items), reversed(cheapest), reversed(taken), strict=True):
        i = int(which[left])
        chosen.append(i)
        left -= steps_for(item[i][0] - least)
    return _topped_up(items, chosen[::-1], budget)


def _topped_up(items: Sequence[Sequence[tuple[float, float]]], chosen: list[int], budget: float) -> list[int]:
    """Spend what the rounding left over on whatever lowers the error most."""
    while True:
        left = budget - sum(item[i][0] for item, i in zip(items, chosen, strict=True))
        gains = [
            (item[i][1] - error, k, j)
            for k, (item, i) in enumerate(zip(items, chosen, strict=True))
            for j, (cost, error) in enumerate(item)
            if error < item[i][1] and cost - item[i][0] <= left
        ]
        if not gains:
            return chosen
        _, k, j = max(gains)
        chosen[k] = j
