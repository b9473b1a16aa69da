"""The forms of all layers at once, and the best plan within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxlrd.allocation.choices import Choice
from fxlrd.allocation.knapsack import spend
from fxlrd.allocation.plan import Plan
from fxlrd.graph.channels import Group
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import Stopwatch

_LAMBDAS = 25


@dataclass(frozen=True)
class Merging:
    """A channel group and, for each number of channels to keep, the predicted error and the share of its layers' cost
    that is left.
    """

    whole: Group
    options: Mapping[int, tuple[float, float]]

    @property
    def cut(self) -> list[str]:
        """The layers that the group cuts."""
        consumers = [c.node for c in self.whole.consumers]
        return list(dict.fromkeys(str(n.target) for n in (*self.whole.producers, *consumers)))


@dataclass
class Problem:
    """The layers' forms and the groups that may be merged, and the times measured of the forms."""

    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    items: dict[str, list[Choice]] = field(default_factory=dict)
    groups: dict[str, Merging] = field(default_factory=dict)
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)

    def original(self) -> float:
        """Return what the layers cost as they are."""
        return sum(self._whole(name) for name in self.items)

    def touched(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Return the layers that merging cuts, each with the share of its cost that is left."""
        shares: dict[str, float] = {}
        for group, count in kept.items():
            share = self.groups[group].options[count][1]
            for name in self.groups[group].cut:
                shares[name] = shares.get(name, 1.0) * share
        return shares

    def cost(self, plan: Plan) -> float:
        """Return what the layers cost under a plan."""
        return self._sum(plan)[0]

    def error(self, plan: Plan) -> float:
        """Return the predicted error of a plan."""
        return self._sum(plan)[1]

    def note(self, plan: Plan) -> str:
        """Return what is predicted of a plan, in words."""
        return f"predicted output error {math.sqrt(self.error(plan)):.2g}"

    def least(self) -> float:
        """Return the least that the layers can cost."""
        bare = [sum(min(c.cost for c in item) for item in self.items.values())]
        bare += [cost for state in self._states() if (cost := self._cheapest(state)) is not None]
        return min(bare)

    def best(self, budget: float) -> Plan | None:
        """Return the plan of the least predicted error within the budget, or None if there is none."""
        plans = [plan for state in self._states() if (plan := self._filled(state, budget)) is not None]
        plan = min((self._topped_up(plan, budget) for plan in plans), key=self.error, default=None)
        return None if plan is None else self._improved(plan, budget)

    def _topped_up(self, plan: Plan, budget: float) -> Plan:
        """Keep more channels of the merged groups with what is left of the budget, all else as it is."""
        while True:
            more = [
                Plan(plan.ranks, {**plan.kept, group: count})
                for group, now in plan.kept.items()
                for count in self.groups[group].options
                if count > now
            ]
            fits = [p for p in more if self.cost(p) <= budget and self.error(p) < self.error(plan)]
            if not fits:
                return plan
            plan = min(fits, key=self.error)

    def _improved(self, plan: Plan, budget: float) -> Plan:
        """Move one group at a time to its next number of channels while that pays: between two λ much may be left."""
        before = None
        while before is not plan:
            before = plan
            for group, merging in self.groups.items():
                counts = [*sorted(merging.options), None]
                at = counts.index(plan.kept.get(group))
                for count in counts[max(0, at - 1) : at + 2]:
                    kept = {g: r for g, r in plan.kept.items() if g != group}
                    trial = self._filled(kept if count is None else {**kept, group: count}, budget)
                    if trial is not None and self.error(trial) < self.error(plan):
                        plan = trial
        return plan

    def _whole(self, name: str) -> float:
        return self.items[name][-1].cost  # the original is last

    def _sum(self, plan: Plan) -> tuple[float, float]:
        touched = self.touched(plan.kept)
        cost = sum(self._whole(name) * share for name, share in touched.items())
        error = sum(self.groups[group].options[count][0] for group, count in plan.kept.items())
        for name, item in self.items.items():
            if name not in touched:
                chosen = next(c for c in item if c.ranks == plan.ranks.get(name))
                cost += chosen.cost
                error += chosen.error
        return cost, error

    def _cheapest(self, kept: Mapping[str, int]) -> float:
        touched = self.touched(kept)
        return sum(self._whole(n) * s for n, s in touched.items()) + sum(
            min(c.cost for c in item) for name, item in self.items.items() if name not in touched
        )

    def _filled(self, kept: Mapping[str, int], budget: float) -> Plan | None:
        """Return the best plan with these merges."""
        touched = self.touched(kept)
        free = [name for name in self.items if name not in touched]
        left = budget - sum(self._whole(name) * share for name, share in touched.items())
        chosen = spend([[(c.cost, c.error) for c in self.items[name]] for name in free], left)
        if chosen is None:
            return None
        forms = {name: self.items[name][i].ranks for name, i in zip(free, chosen, strict=True)}
        return Plan({name: ranks for name, ranks in forms.items() if ranks is not None}, dict(kept))

    def _states(self) -> list[dict[str, int]]:
        """Return the sets of merges worth looking at: none, and the outcomes of coordinate descent for each λ."""
        found: list[dict[str, int]] = [{}]
        if not self.groups:
            return found
        for weight in self._lambdas():
            state = self._descend(weight)
            if state not in found:
                found.append(state)
        return found

    def _lambdas(self) -> list[float]:
        error = sum(max(c.error for c in item) for item in self.items.values())
        cost = self.original()
        if not error > 0 or not cost > 0:
            return []
        return [error / cost * 10 ** (1 - 8 * i / (_LAMBDAS - 1)) for i in range(_LAMBDAS)]

    def _descend(self, weight: float) -> dict[str, int]:
        """Return the merges of a local minimum of error + weight · cost."""
        alone = {name: min(c.error + weight * c.cost for c in item) for name, item in self.items.items()}
        readers: dict[str, list[str]] = {}
        for group, merging in self.groups.items():
            for name in merging.cut:
                readers.setdefault(name, []).append(group)
        state: dict[str, int] = {}

        def value(group: str, count: int | None) -> float:
            trial = {**state, group: count} if count is not None else {k: v for k, v in state.items() if k != group}
            total = 0.0 if count is None else self.groups[group].options[count][0]
            for name in self.groups[group].cut:
                shares = [self.groups[g].options[trial[g]][1] for g in readers[name] if g in trial]
                total += weight * self._whole(name) * math.prod(shares) if shares else alone[name]
            return total

        for _ in range(8):
            before = dict(state)
            for group, merging in self.groups.items():
                best = min([None, *merging.options], key=lambda count: value(group, count))
                state.pop(group, None)
                if best is not None:
                    state[group] = best
            if state == before:
                break
        return state
