"""The forms of all layers and the merges of all groups at once, and the best plan within a budget.

Where no two groups cut one layer, all of it is one knapsack (fxlrd/allocation/parts.py). Elsewhere, which groups to
merge is found by coordinate descent on Σ error + λ·Σ cost for a series of λ. For each outcome the other layers' forms
are the exact solution of the knapsack, and the best of these plans is improved group by group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fxlrd.allocation.choices import Choice
from fxlrd.allocation.knapsack import spend
from fxlrd.allocation.merges import Merging
from fxlrd.allocation.parts import Part, parts_of, together
from fxlrd.allocation.plan import Plan

_LAMBDAS, _WEIGHTS = 25, 201
"""Weights of cost that plans are searched from, and those that a bound is the best of."""
_SWEEPS = 8
_STEPS = 32768
"""Of the knapsack where it is solved once."""
_ROUNDING = 1e-9
"""Share of an error that a bound of it may be off by."""
Array = np.ndarray[Any, np.dtype[np.float64]]
Retained = Mapping[str, int]
"""How many channels merged groups retain, by the name of the group's first producer."""


@dataclass(frozen=True)
class Problem:
    """The forms of each layer, its original last, and the groups that may be merged.

    What does not depend on the budget is computed once; a problem is not to be changed.

    Attributes:
        items: the forms by layer.
        groups: by the name of the group's first producer.
        biases: by layer, the part of its cost that goes with what it makes, whatever it reads.
    """

    items: Mapping[str, Sequence[Choice]]
    groups: Mapping[str, Merging] = field(default_factory=dict)
    biases: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def original(self) -> float:
        """The cost of the layers as they are."""
        return sum(self._original(name) for name in self.items)

    @cached_property
    def least(self) -> float:
        """The least that the layers can cost."""
        if self._parts is not None:
            return sum(min(part.cost for part in item) for item in self._parts)
        bare = sum(min(c.cost for c in item) for item in self.items.values())
        return min([bare, *(self._cheapest(retained) for retained in self._merges)])

    def best(self, budget: float) -> Plan | None:
        """Return the plan of the least predicted error within the budget, or None if there is none."""
        if self._parts is not None:
            return self._packed(self._parts, budget)
        plans = [plan for retained in self._merges if (plan := self._filled(retained, budget)) is not None]
        plan = min((self._topped_up(plan, budget) for plan in plans), key=self.error, default=None)
        return None if plan is None else self._improved(plan, budget)

    def cost(self, plan: Plan) -> float:
        """Return what the layers cost under a plan."""
        return sum((choice.cost for choice in self._chosen(plan)), self._merged_cost(plan.retained))

    def error(self, plan: Plan) -> float:
        """Return the predicted error of a plan: the relative squared error of the model's output."""
        merged = sum(self.groups[group].options[count].error for group, count in plan.retained.items())
        return sum((choice.error for choice in self._chosen(plan)), merged)

    def cut(self, retained: Retained) -> set[str]:
        """Return the layers that merges cut."""
        return {name for group in retained for name in self.groups[group].cut}

    def _original(self, name: str) -> float:
        return self.items[name][-1].cost

    def _chosen(self, plan: Plan) -> Iterator[Choice]:
        """Return the forms under a plan of the layers that no merge cuts."""
        cut = self.cut(plan.retained)
        for name, item in self.items.items():
            if name not in cut:
                yield next(choice for choice in item if choice.ranks == plan.ranks.get(name))

    def _cheapest(self, retained: Retained) -> float:
        """Return the least that the layers can cost with these merges."""
        cut = self.cut(retained)
        free = (min(c.cost for c in item) for name, item in self.items.items() if name not in cut)
        return self._merged_cost(retained) + sum(free)

    def _merged_cost(self, retained: Retained) -> float:
        """Return what the layers cost that merges cut, less what is saved between them."""
        saved = sum(self._saved(group, count) for group, count in retained.items())
        return sum(self._cost_cut(name, retained) for name in sorted(self.cut(retained))) - saved

    def _saved(self, group: str, count: int) -> float:
        return self.groups[group].between * (1 - self.groups[group].options[count].share)

    def _cost_cut(self, name: str, retained: Retained) -> float:
        """Return what a layer costs that merges cut: W with fewer rows, columns or both, and its bias."""
        reads, makes = (
            math.prod(self.groups[g].options[retained[g]].share for g in groups if g in retained)
            for groups in self._cutters[name]
        )
        bias = self.biases.get(name, 0.0)
        return makes * (reads * (self._original(name) - bias) + bias)

    @cached_property
    def _cutters(self) -> dict[str, tuple[list[str], list[str]]]:
        """By layer, the groups that it reads and those that it makes."""
        cutters: dict[str, tuple[list[str], list[str]]] = {}
        for group, merging in self.groups.items():
            for name in merging.cut:
                reads, makes = cutters.setdefault(name, ([], []))
                if name in merging.made_by:
                    makes.append(group)
                if name in merging.read_by:
                    reads.append(group)
        return cutters

    @cached_property
    def _parts(self) -> list[list[Part]] | None:
        """The items of the knapsack where no two groups cut one layer, else None."""
        grouped = [name for merging in self.groups.values() for name in merging.cut]
        if len(set(grouped)) < len(grouped):
            return None
        alone = [parts_of(name, item) for name, item in self.items.items() if name not in grouped]
        return alone + [self._parts_of_group(group) for group in self.groups]

    def _parts_of_group(self, group: str) -> list[Part]:
        options = self.groups[group].options
        merged = [Part(self._merged_cost({group: c}), o.error, {}, {group: c}) for c, o in options.items()]
        forms = together([parts_of(name, self.items[name]) for name in self.groups[group].cut])
        return [*forms, *merged]

    def _packed(self, parts: Sequence[Sequence[Part]], budget: float) -> Plan | None:
        chosen = spend([[(part.cost, part.error) for part in item] for item in parts], budget, _STEPS)
        if chosen is None:
            return None
        total = sum((item[i] for item, i in zip(parts, chosen, strict=True)), Part(0.0, 0.0))
        return Plan(total.ranks, total.retained)

    def _filled(self, retained: Retained, budget: float) -> Plan | None:
        """Return the best plan with these merges, or None if there is none within the budget."""
        cut = self.cut(retained)
        free = [name for name in self.items if name not in cut]
        remaining = budget - self._merged_cost(retained)
        chosen = spend([[(c.cost, c.error) for c in self.items[name]] for name in free], remaining)
        if chosen is None:
            return None
        forms = {name: self.items[name][i].ranks for name, i in zip(free, chosen, strict=True)}
        return Plan({name: ranks for name, ranks in forms.items() if ranks is not None}, dict(retained))

    def _topped_up(self, plan: Plan, budget: float) -> Plan:
        """Let the merged groups retain more channels with the rest of the budget, all else as it is."""
        retained = dict(plan.retained)
        uncut = [choice.cost for choice in self._chosen(plan)]
        while True:
            gains = [
                (self._gain(group, count, larger), group, larger)
                for group, count in retained.items()
                for larger in self.groups[group].options
                if larger > count
            ]
            for gain, group, larger in sorted(gains, key=lambda each: -each[0]):
                if gain > 0 and sum(uncut, self._merged_cost({**retained, group: larger})) <= budget:
                    retained[group] = larger
                    break
            else:
                return Plan(plan.ranks, retained) if retained != plan.retained else plan

    def _gain(self, group: str, count: int, larger: int) -> float:
        """Return by how much the error falls where a group retains a larger number of channels."""
        options = self.groups[group].options
        return options[count].error - options[larger].error

    def _improved(self, plan: Plan, budget: float) -> Plan:
        """Move one group or two at a time to their next numbers of channels while that helps: λ is a coarse grid."""
        before = None
        while before is not plan:
            before = plan
            plan = self._exchanged(self._stepped(plan, budget), budget)
        return plan

    def _exchanged(self, plan: Plan, budget: float) -> Plan:
        """Let one group retain fewer channels and another one more, all else as it is, if that helps."""
        cost, error = self.cost(plan), self.error(plan)

        def change(moves: Mapping[str, int | None]) -> tuple[float, float]:
            trial = self._with(plan, moves)
            return self.cost(trial) - cost, self.error(trial) - error

        fewer = {a: below for a in self.groups if (below := self._next(plan, a)[0]) is not None}
        more = {b: self._next(plan, b)[1] for b in plan.retained}
        down, up = ({g: change({g: count}) for g, count in moves.items()} for moves in (fewer, more))
        moves, least = {}, 0.0
        for a, b in itertools.product(fewer, more):
            pair = {a: fewer[a], b: more[b]}
            if a == b or down[a][1] + up[b][1] >= least:
                continue
            if set(self.groups[a].cut).isdisjoint(self.groups[b].cut):  # then both changes add up
                spent, gained = down[a][0] + up[b][0], down[a][1] + up[b][1]
            else:
                spent, gained = change(pair)
            if cost + spent <= budget and gained < least:
                moves, least = pair, gained
        trials = [self._with(plan, moves)]
        if (filled := self._filled(trials[0].retained, budget)) is not None:
            trials.append(filled)
        fits = [t for t in trials if self.cost(t) <= budget and self.error(t) < error]
        return min(fits, key=self.error, default=plan)

    def _with(self, plan: Plan, moves: Mapping[str, int | None]) -> Plan:
        """Return the plan with other numbers of channels for some groups."""
        retained = plan.retained
        for group, count in moves.items():
            retained = _moved(retained, group, count)
        cut = self.cut(retained)
        return Plan({name: ranks for name, ranks in plan.ranks.items() if name not in cut}, retained)

    def _next(self, plan: Plan, group: str) -> tuple[int | None, int | None]:
        """Return a group's next smaller number of channels, or None, and its next larger one: None is not to merge."""
        counts = [*sorted(self.groups[group].options), None]
        at = counts.index(plan.retained.get(group))
        return counts[at - 1] if at else None, counts[at + 1] if at + 1 < len(counts) else None

    def _stepped(self, plan: Plan, budget: float) -> Plan:
        """Move one group at a time."""
        least = self.error(plan)

        def better(retained: Retained) -> None:
            nonlocal plan, least
            if self._bound(retained, budget) > least * (1 + _ROUNDING):
                return
            trial = self._filled(retained, budget)
            if trial is not None and (error := self.error(trial)) < least:
                plan, least = trial, error

        better(plan.retained)
        before = None
        while before is not plan:
            before = plan
            for group, merging in self.groups.items():
                counts = [*sorted(merging.options), None]
                at = counts.index(plan.retained.get(group))
                for count in counts[max(0, at - 1) : at + 2]:
                    if count != plan.retained.get(group):
                        better(_moved(plan.retained, group, count))
        return plan

    def _bound(self, retained: Retained, budget: float) -> float:
        """Return what no plan with these merges within the budget has less error than.

        For any weight λ of costs, that is the least of error + λ·(cost − budget), in which each layer's form is chosen
        alone (Lagrangian relaxation).
        """
        weights, least = self._relaxed
        cut = self.cut(retained)
        free = [i for i, name in enumerate(self.items) if name not in cut]
        merged = sum(self.groups[group].options[count].error for group, count in retained.items())
        return float((merged + least[free].sum(0) + weights * (self._merged_cost(retained) - budget)).max())

    @cached_property
    def _relaxed(self) -> tuple[Array, Array]:
        """Weights λ of costs, and by layer and weight the least error + λ·cost of its forms."""
        top, *_, bottom = self._lambdas() or [0.0, 0.0]
        weights = np.geomspace(top, bottom, _WEIGHTS) if bottom > 0 else np.zeros(1)
        least = [np.min([c.error + weights * c.cost for c in item], axis=0) for item in self.items.values()]
        return weights, np.array(least)

    @cached_property
    def _merges(self) -> list[Retained]:
        """The sets of merges that plans start from: none, and the outcomes of the descent for each λ."""
        merges: list[Retained] = [{}]
        for weight in self._lambdas() if self.groups else ():
            retained = self._descend(weight)
            if retained not in merges:
                merges.append(retained)
        return merges

    def _lambdas(self) -> list[float]:
        error = sum(max(c.error for c in item) for item in self.items.values()) or sum(
            max(option.error for option in merging.options.values()) for merging in self.groups.values()
        )
        if not error > 0 or not self.original > 0:
            return []
        return [error / self.original * 10 ** (1 - 8 * i / (_LAMBDAS - 1)) for i in range(_LAMBDAS)]

    def _descend(self, weight: float) -> Retained:
        """Return the merges of a local minimum of error + weight · cost."""
        alone = {name: min(c.error + weight * c.cost for c in item) for name, item in self.items.items()}
        retained: Retained = {}

        def value(group: str, count: int | None) -> float:
            trial = _moved(retained, group, count)
            total = 0.0
            if count is not None:
                total = self.groups[group].options[count].error - weight * self._saved(group, count)
            for name in self.groups[group].cut:
                cut = any(g in trial for groups in self._cutters[name] for g in groups)
                total += weight * self._cost_cut(name, trial) if cut else alone[name]
            return total

        for _ in range(_SWEEPS):
            before = retained
            for group, merging in self.groups.items():
                best = min([None, *merging.options], key=lambda count: value(group, count))
                retained = _moved(retained, group, best)
            if retained == before:
                break
        return retained


def within(groups: Mapping[str, Merging], rest: float) -> dict[str, Merging]:
    """Return the groups such that all between their layers costs no more than the ``rest``: what no layer costs.

    What is timed alone may take longer than in the model, where it is fused with layers, or finds its input in a cache.
    """
    between = sum(merging.between for merging in groups.values())
    scale = max(rest, 0.0) / between if between > 0 else 1.0
    return {
        name: merging if scale >= 1 else replace(merging, between=merging.between * scale)
        for name, merging in groups.items()
    }


def _moved(retained: Retained, group: str, count: int | None) -> Retained:
    """Return the merges with ``count`` channels for a group; None is not to merge it."""
    others = {name: number for name, number in retained.items() if name != group}
    return others if count is None else {**others, group: count}
