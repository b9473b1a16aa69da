from __future__ import annotations

from types import SimpleNamespace

import pytest

from fxlrd import Budget, FxlrdError
from fxlrd.allocation.choices import Choice
from fxlrd.allocation.merges import Merging, Option
from fxlrd.allocation.problem import Problem
from fxlrd.allocation.search import WITHIN, plan_computed, plan_measured
from fxlrd.progress import quiet

REST = 20.0


def problem() -> Problem:
    """Return ten layers of cost 10 and forms of every smaller whole cost, whose errors rise as those fall."""
    items = {
        str(i): [*(Choice((c,), (1 + i) / c**2, float(c)) for c in range(1, 10)), Choice(None, 0.0, 10.0)]
        for i in range(10)
    }
    return Problem(items)


def exactly(share_of):
    """Return what measures a plan: its layers' cost and the rest, relative to the original's, through ``share_of``."""
    shared = problem()
    return lambda plan: share_of((shared.cost(plan) + REST) / (shared.original + REST))


def test_a_computed_budget_counts_what_is_outside_of_the_layers():
    plan, share = plan_computed(problem(), 100.0 + REST, Budget(params=0.5))
    assert problem().cost(plan) == 40.0
    assert share == 0.5


def test_a_computed_budget_out_of_reach_says_what_is_within():
    with pytest.raises(FxlrdError, match=r"params=0.2 is out of reach: the cheapest forms leave 0.250 of it"):
        plan_computed(problem(), 100.0 + REST, Budget(params=0.2))
    with pytest.raises(FxlrdError, match="nothing in it can be made cheaper"):
        plan_computed(Problem({"a": [Choice(None, 0.0, 1.0)]}), 1.0, Budget(params=0.5))


@pytest.mark.parametrize("share_of", [lambda s: s, lambda s: s**0.6, lambda s: s**1.8, lambda s: 0.3 + 0.7 * s])
def test_a_measured_budget_is_met_whatever_layers_save_in_the_model(share_of):
    plan, share = plan_measured(problem(), 100.0 + REST, 0.6, exactly(share_of), quiet)
    assert share == exactly(share_of)(plan)
    assert share == pytest.approx(0.6, rel=WITHIN)


def test_a_measured_budget_is_not_exceeded_by_more_than_its_tolerance():
    steps = exactly(lambda s: 0.5 if s < 0.6 else 0.9)  # nothing between
    assert plan_measured(problem(), 100.0 + REST, 0.7, steps, quiet)[1] == 0.5


def test_a_measured_budget_out_of_reach_says_what_is_within():
    with pytest.raises(FxlrdError, match=r"latency=0.1 is out of reach: the fastest forms take 0\.250 of"):
        plan_measured(problem(), 100.0 + REST, 0.1, exactly(lambda s: s), quiet)
    with pytest.raises(FxlrdError, match="no form of its layers is faster here"):
        plan_measured(problem(), 100.0 + REST, 0.5, lambda plan: 1.1, quiet)


def test_a_cut_that_saves_more_between_layers_than_they_cost():
    """What is left of the layers' cost is then negative: two of them, of cost 1, and norms of cost 10 between."""
    (node_a, node_b) = (SimpleNamespace(node=SimpleNamespace(target=name)) for name in "ab")
    group = SimpleNamespace(cut=["a", "b"], producers=[node_a], consumers=[node_b])
    items = {name: [Choice(None, 0.0, 1.0)] for name in "ab"}
    narrow = Problem(items, {"a": Merging(group, {4: Option(0.1, 0.25)}, between=10.0)})
    assert narrow.least < 0
    with pytest.raises(FxlrdError, match=r"the fastest forms take 0\.300 of"):
        plan_measured(narrow, 12.0, 0.05, lambda plan: 0.3, quiet)
