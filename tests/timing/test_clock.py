from __future__ import annotations

from functools import partial

import pytest
import torch

from fxlrd.timing.clock import SPREAD, Timing, compare
from tests.support.timers import FakeClock

CPU = torch.device("cpu")


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def measure(clock):
    return partial(compare, device=CPU, clock=clock.perf_counter)


def test_faster_than_the_reference_only_beyond_the_noise():
    assert Timing(1.0, 0.9, 0.05).faster()
    assert not Timing(1.0, 0.95, 0.05).faster()
    assert not Timing(1.0, 0.99, 0.05).faster()
    assert not Timing(1.0).faster()
    assert not Timing(1.0, 1.2, 0.0).faster()


def test_faster_than_another_only_beyond_the_noise_of_both():
    other = Timing(1.0, 0.9, 0.04)
    assert Timing(1.0, 0.84, 0.03).faster(other)
    assert not Timing(1.0, 0.86, 0.03).faster(other)
    assert not other.faster(Timing(1.0, 0.84, 0.03))
    assert not other.faster(other)


def test_compare_measures_ratios_to_the_first(clock, measure):
    timings = measure({"a": clock.call("a", 1e-3), "b": clock.call("b", 2e-3)})
    assert list(timings) == ["a", "b"]
    assert (timings["a"].seconds, timings["b"].seconds) == pytest.approx((1e-3, 2e-3), rel=1e-9)
    assert (timings["a"].ratio, timings["b"].ratio) == pytest.approx((1, 2), rel=1e-9)
    assert (timings["a"].spread, timings["b"].spread) == pytest.approx((0, 0), abs=1e-9)


def test_compare_interleaves_and_alternates(clock, measure):
    measure({"a": clock.call("a", 1e-3), "b": clock.call("b", 1e-3), "c": clock.call("c", 1e-3)})
    assert clock.ran[:9] == [*"aaabbbccc"]
    rounds = ["".join(clock.ran[i : i + 6]) for i in range(9, len(clock.ran), 6)]
    assert rounds == ["aabbcc", "ccbbaa"] * 3 + ["aabbcc"]


def test_what_a_device_still_computes_does_not_count_for_the_next_sample(clock, monkeypatch):
    """An accelerator takes calls and computes later; ``synchronize`` waits for all of them."""
    pending = []

    def synchronize(device):
        clock.now += sum(pending)
        pending.clear()

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    calls = {"a": lambda: pending.append(1e-4), "b": lambda: pending.append(2e-3)}
    timings = compare(calls, torch.device("cuda"), clock=clock.perf_counter)
    assert (timings["a"].seconds, timings["b"].seconds) == pytest.approx((1e-4, 2e-3), rel=1e-9)
    assert timings["b"].ratio == pytest.approx(20, rel=1e-9)


def test_a_drift_of_the_machine_leaves_the_ratios(clock, measure):
    def drifting(cost):
        return lambda ran: cost * (1 + (max(0, ran - 6) // 4) ** 2)  # four calls a round after six to warm up

    timings = measure({"a": clock.call("a", drifting(1e-3)), "b": clock.call("b", drifting(3e-3))})
    assert timings["b"].ratio == pytest.approx(3, rel=1e-9)
    assert timings["b"].spread == pytest.approx(0, abs=1e-9)
    assert timings["a"].seconds == pytest.approx(1e-2, rel=1e-9)  # the middle one of seven rounds: 1 + 3²


def test_short_calls_are_repeated_within_a_sample(clock, measure):
    timings = measure({"a": clock.call("a", 1e-4), "b": clock.call("b", 1e-3)})
    assert timings["a"].seconds == pytest.approx(1e-4, rel=1e-9)
    assert timings["b"].ratio == pytest.approx(10, rel=1e-9)
    assert clock.ran.count("a") == 3 + 7 * (1 + 5)
    assert clock.ran.count("b") == 3 + 7 * (1 + 1)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (0.0605, 11), (1e9, 60)])
def test_noise_goes_on_to_the_limit(clock, measure, seconds, rounds):
    def noisy(_):  # 1, 2, 3, 1, … milliseconds, each for both calls of a round
        return 1e-3 * (1 + (clock.ran.count("b") - 3) // 2 % 3)

    timings = measure({"a": clock.call("a", 1e-3), "b": clock.call("b", noisy)}, seconds=seconds)
    assert clock.ran.count("a") == 3 + 2 * rounds
    assert timings["a"].spread == 0
    assert timings["b"].spread > SPREAD * timings["b"].ratio


def test_spread_is_the_interval_of_a_median(clock, measure):
    def steps(ran):  # of seven rounds: 1, 2, 3, 4, 5, 6, 7 ms in the sample, whatever in the calls before it
        return 1e-3 * max(1, (ran - 6) // 4 + 1)

    timings = measure({"a": clock.call("a", 1e-3), "b": clock.call("b", steps)}, seconds=0.0)
    assert (timings["b"].seconds, timings["b"].ratio) == pytest.approx((4e-3, 4), rel=1e-9)
    assert timings["b"].spread == pytest.approx(1.96 * 1.2533 * 1.4826 * 2 / 7**0.5, rel=1e-9)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_clock_that_stands_still_or_jumps_back(step):
    now = iter(range(10**6))
    timings = compare({"a": lambda: None, "b": lambda: None}, CPU, clock=lambda: step * next(now))
    assert all(t.seconds > 0 and t.ratio > 0 for t in timings.values())
