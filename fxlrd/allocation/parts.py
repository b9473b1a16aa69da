"""Layers that are decided on together, as items of the knapsack.

Layers that one group of channels joins, and no other, take either forms of their own or one of the group's merges. All
of that is one choice among parts: the sums of the layers' forms that no other beats in both cost and error, and the
merges. Where every group is so, as in transformers, the plan is one knapsack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fxlrd.allocation.choices import Choice, pareto
from fxlrd.layers.forms import Ranks

MOST = 96
"""Sums of forms that are kept, at most: those at even distances along the front."""


@dataclass(frozen=True)
class Part:
    """What some layers may become: their ranks, and the channels that groups retain, by name; its cost and error."""

    cost: float
    error: float
    ranks: Mapping[str, Ranks] = field(default_factory=dict)
    retained: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Part) -> Part:
        """Return what the layers of both become."""
        return Part(
            self.cost + other.cost,
            self.error + other.error,
            {**self.ranks, **other.ranks},
            {**self.retained, **other.retained},
        )


def parts_of(name: str, forms: Iterable[Choice]) -> list[Part]:
    """Return the forms of one layer as parts."""
    return [Part(form.cost, form.error, {} if form.ranks is None else {name: form.ranks}) for form in forms]


def together(items: Sequence[Sequence[Part]]) -> list[Part]:
    """Return the sums of one part of each item that no other sum beats in both cost and error, thinned out."""
    sums = [Part(0.0, 0.0)]
    for item in items:
        sums = pareto((a + b for a in sums for b in item), MOST)
    return sums
