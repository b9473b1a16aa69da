from __future__ import annotations

import pytest
import torch

from fxlrd.timing.peak import peak_rate
from fxlrd.timing.stopwatch import Stopwatch
from tests.support.timers import FakeTimer

CPU = torch.device("cpu")


def rate(seconds: dict[str, float], cached: bool = True) -> float:
    timer = FakeTimer(lambda name, _: seconds[name])
    return peak_rate(torch.float32, CPU, Stopwatch(cached=cached, timer=timer))


def test_the_peak_is_that_of_the_fastest_multiply_and_is_cached():
    assert rate({"256": 1e-3, "512": 1e-3, "1024": 6e-3, "2048": 50e-3}) == pytest.approx(2 * 1024**3 / 6e-3)
    faster = {"256": 1e-3, "512": 1e-6, "1024": 6e-3, "2048": 50e-3}
    assert rate(faster) == pytest.approx(2 * 1024**3 / 6e-3)
    assert rate(faster, cached=False) == pytest.approx(2 * 512**3 / 1e-6)


def test_a_dtype_without_kernels_is_not_multiplied_at_large_sizes():
    timer = FakeTimer(lambda name, _: 0.5)
    peak_rate(torch.bfloat16, CPU, Stopwatch(cached=False, timer=timer))
    assert timer.rounds == [["256"]]
