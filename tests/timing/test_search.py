from __future__ import annotations

import pytest

from fxlrd.layers.forms import ranks_text
from fxlrd.timing.clock import Timing
from fxlrd.timing.search import best_share, grid, largest_drop, scan

NOISE = 0.01


def timings(ratios: dict[tuple, float]) -> dict[str, Timing]:
    return {ranks_text(ranks): Timing(ratio, ratio, NOISE) for ranks, ratio in ratios.items()}


def cost(ranks) -> float:
    return float(ranks[0])


@pytest.mark.parametrize(
    ("ranks", "lowest", "groups", "candidates"),
    [
        ((75,), (57,), 1, [(75,), (64,)]),
        ((75,), (72,), 1, [(75,), (72,)]),  # 64 is under the floor: a multiple of 8 in its place
        ((200,), (100,), 1, [(200,), (192,)]),
        ((130,), (60,), 1, [(130,), (128,)]),
        ((90,), (60,), 1, [(90,), (80,), (64,)]),
        ((64,), (48,), 1, [(64,)]),
        ((7,), (6,), 1, [(7,)]),
        ((38, 37), (29, 28), 1, [(38, 37), (32, 32)]),
        ((None, 37), (None, 28), 1, [(None, 37), (None, 32)]),
        ((9, 9), (7, 7), 2, [(9, 9), (8, 8)]),  # of all groups together they are multiples of 16
    ],
)
def test_the_grid_has_the_rank_and_the_hardware_multiples_down_to_the_floor(ranks, lowest, groups, candidates):
    assert grid(ranks, lowest, groups) == candidates


def test_the_choice_gains_most_over_its_share_of_the_cost():
    candidates = [(80,), (64,), (32,)]
    times = timings({(80,): 0.8, (64,): 0.5, (32,): 0.45})
    assert best_share(candidates, times, cost, trade=0.0) == (32,), "the fastest"
    assert best_share(candidates, times, cost, trade=1.0) == (64,)


@pytest.mark.parametrize("trade", [0.0, 0.5, 1.0])
def test_a_gain_within_the_noise_is_none(trade):
    candidates = [(80,), (64,)]
    slower = timings({(80,): 0.8, (64,): 0.8 * (64 / 80) ** trade - NOISE})
    faster = timings({(80,): 0.8, (64,): 0.8 * (64 / 80) ** trade - 2 * NOISE})
    assert best_share(candidates, slower, cost, trade) == (80,)
    assert best_share(candidates, faster, cost, trade) == (64,)


def test_a_scan_descends_by_one_and_keeps_the_modes_in_proportion():
    assert scan((5,), (3,)) == [(5,), (4,), (3,)]
    assert scan((4, 8), (2, 4)) == [(4, 8), (3, 6), (2, 4)]
    assert scan((None, 3), (None, 2)) == [(None, 3), (None, 2)]
    assert scan((8, 2), (1, 1))[-1] == (1, 1), "no mode falls below 1"


def test_the_rank_below_the_largest_drop_is_chosen():
    candidates = [(5,), (4,), (3,), (2,)]
    assert largest_drop(candidates, timings({(5,): 0.9, (4,): 0.8, (3,): 0.5, (2,): 0.45})) == (3,)
    assert largest_drop(candidates, timings({(5,): 0.9, (4,): 0.9, (3,): 0.9, (2,): 0.9 - NOISE})) == (5,)
