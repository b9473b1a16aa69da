from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxlrd import Budget, FxlrdError
from fxlrd.allocation.knapsack import STEPS, spend
from fxlrd.budget import is_share


@pytest.mark.parametrize("measure", ["params", "flops", "latency", "layers"])
def test_a_budget_is_one_share(measure):
    budget = Budget(**{measure: 0.25})
    assert (budget.measure, budget.share) == (measure, 0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"budget: give one of params, flops, latency or layers, such as Budget\(latency=0.5\); got nothing"),
        ({"params": 0.5, "flops": 0.5}, "got params and flops"),
        ({"params": 1.0}, "budget: params=1.0 is not a fraction of the original between 0 and 1, such as 0.5"),
        ({"flops": 0}, "flops=0 is not a fraction"),
        ({"latency": 2}, "latency=2 is not a fraction"),
        ({"latency": -0.5}, "latency=-0.5 is not a fraction"),
        ({"params": math.nan}, "params=nan is not a fraction"),
        ({"params": "0.5"}, "params='0.5' is not a fraction"),
        ({"params": True}, "params=True is not a fraction"),
    ],
)
def test_what_is_no_budget(given, message):
    with pytest.raises(FxlrdError, match=message) as error:
        Budget(**given)
    assert "\n" not in str(error.value)


def test_shares():
    assert is_share(0.5)
    assert not any(is_share(v) for v in (0, 1, 1.0, -0.1, math.inf, None, "0.5", True, 1j))


def totals(items, chosen):
    picked = [item[i] for item, i in zip(items, chosen, strict=True)]
    return sum(c for c, _ in picked), sum(e for _, e in picked)


def brute(items, budget):
    """The least sum of errors within the budget, or None."""
    every = (totals(items, chosen) for chosen in itertools.product(*(range(len(item)) for item in items)))
    return min((e for c, e in every if c <= budget), default=None)


def choices(costs):
    return st.lists(st.lists(st.tuples(costs, st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(choices(st.integers(0, 12)), st.integers(0, 40))
def test_whole_costs_are_spent_in_the_best_way(items, budget):
    # The budget is cut in STEPS: what is spare has to divide them for whole costs not to be rounded.
    cheapest = sum(min(c for c, _ in item) for item in items)
    if budget > cheapest:
        budget = cheapest + 2 ** int(math.log2(budget - cheapest))
    chosen = spend(items, budget)
    wanted = brute(items, budget)
    if wanted is None:
        assert chosen is None
        return
    cost, error = totals(items, chosen)
    assert cost <= budget
    assert error == wanted


@settings(deadline=None, max_examples=200)
@given(choices(st.floats(0, 10)), st.floats(0, 40))
@example([[(0.0, 0.0), (1.0, 0.0)]], 2.225073858507203e-309)  # a cost is infinitely many of its steps
def test_any_costs_are_spent_within_the_budget_and_the_best_way_but_for_a_step_each(items, budget):
    chosen = spend(items, budget)
    cheapest = sum(min(c for c, _ in item) for item in items)
    if chosen is None:
        assert cheapest > budget
        return
    cost, error = totals(items, chosen)
    assert cost <= budget * (1 + 1e-12)
    # Rounding up costs less than a step for each item, so it is at least as good as the best with those less.
    rounding = len(items) * (budget - cheapest) / STEPS
    within = brute(items, budget - rounding * (1 + 1e-6))
    assert within is None or error <= within
    assert error >= brute(items, budget * (1 + 1e-12))


def test_none_where_even_the_cheapest_exceed_the_budget():
    assert spend([[(3, 0.0)], [(2, 1.0), (4, 0.0)]], 4.9) is None
    assert spend([[(3, 0.0)], [(2, 1.0), (4, 0.0)]], 5) == [0, 0]


@pytest.mark.parametrize("cost", [0, 3, 0.1])
def test_with_nothing_to_spare_the_cheapest_are_taken(cost):
    items = [[(cost, 2.0), (cost + 1, 0.0)], [(2 + cost, 0.0), (cost, 3.0)], [(cost, 5.0), (cost, 1.0)]]
    assert spend(items, cost + cost + cost) == [0, 1, 1]


def test_with_plenty_every_error_is_the_least():
    items = [[(i, 1 / (1 + i * k)) for i in range(30)] for k in (1, 2, 3)]
    assert spend(items, 1e6) == [29, 29, 29]
    assert spend(items, 87) == [29, 29, 29]


def test_of_equals_any_but_one_within_the_budget():
    items = [[(1, 1.0), (1, 1.0), (2, 0.5), (2, 0.5)]] * 3
    assert totals(items, spend(items, 5)) == (5, 2.0)


def test_no_items():
    assert spend([], 1.0) == []


def test_a_costlier_form_that_is_worse_is_never_taken():
    items = [[(5, 1.0), (9, 4.0), (1, 2.0)], [(7, 3.0), (2, 2.0)]]
    assert [spend(items, b) for b in (3, 6.9, 7, 100)] == [[2, 1], [2, 1], [0, 1], [0, 1]]


def test_trade_offs_that_no_price_reaches_are_found():
    # The middle form lies above the line between the others: no Lagrange multiplier would choose it.
    items = [[(0, 10.0), (5, 6.0), (8, 0.0)]] * 2
    assert sorted(spend(items, 13)) == [1, 2]


def test_rounding_left_over_is_spent():
    # Each of many costs is just above a step: rounded up, only half of them would be taken.
    step = 1.0 / STEPS
    items = [[(0.0, 1.0), (1.1 * step, 0.0)]] * 100 + [[(0.0, 0.0), (1.0, 0.0)]]
    chosen = spend(items, 120 * step)
    assert totals(items, chosen)[1] == 0
