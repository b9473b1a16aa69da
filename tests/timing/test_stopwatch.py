"""A machine that changes its speed between two timings: seconds of different minutes never meet."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from fxlrd.graph.inputs import Inputs
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import REFERENCE, Stopwatch
from fxlrd.timing.workload import Workload
from tests.support.timers import KERNELS, FakeTimer

CPU = torch.device("cpu")
SECONDS = {"original": 4e-3, "half": 2e-3, "quarter": 1e-3, "eighth": 5e-4, "model": 10e-3}


def machine(slowdown: float = 1.0, spread: float = 0.0) -> FakeTimer:
    """Return a timer on a machine that takes ``slowdown`` times as long for everything."""
    return FakeTimer(lambda name, _: slowdown * SECONDS[name], spread, kernel=slowdown * 1e-3)


def workload() -> Workload:
    return Workload([(nn.Identity(), Inputs((torch.ones(1),)))])


def times(stopwatch: Stopwatch, *names: str, signature: str = "layer"):
    return stopwatch.times(signature, CPU, dict.fromkeys(names, workload))


def seconds(timings) -> dict[str, float]:
    return {name: timing.seconds for name, timing in timings.items()}


def test_times_are_those_of_the_timer():
    timings = times(Stopwatch(timer=machine(spread=0.01)), "original", "half")
    assert seconds(timings) == pytest.approx({"original": 4e-3, "half": 2e-3})
    assert (timings["original"].ratio, timings["original"].spread) == (1, 0)
    assert (timings["half"].ratio, timings["half"].spread) == (0.5, 0.01)


@pytest.mark.parametrize("slowdown", [0.25, 1.0, 5.0])
def test_a_timing_from_disk_is_in_seconds_of_this_run(slowdown):
    times(Stopwatch(timer=machine()), "original", "half")
    timer = machine(slowdown)
    stopwatch = Stopwatch(timer=timer)
    timings = times(stopwatch, "original", "half")
    assert seconds(timings) == pytest.approx({"original": 4e-3 * slowdown, "half": 2e-3 * slowdown})
    assert timings["half"].ratio == 0.5
    assert timer.rounds == [], "nothing but the reference kernel was timed"
    assert stopwatch.drift == pytest.approx(max(slowdown, 1 / slowdown))


def test_what_is_uncertain_is_measured_again_by_the_next_run():
    noisy = Stopwatch(timer=machine(spread=0.04))
    assert seconds(times(noisy, "original", "half", "eighth"))["eighth"] == pytest.approx(5e-4)
    assert times(noisy, "eighth")["eighth"].spread == 0.04, "in this run it is known"
    timer = machine()
    timings = times(Stopwatch(timer=timer), "original", "half", "eighth")
    assert timer.rounds == [["original", "eighth"]]
    assert (timings["half"].spread, timings["eighth"].spread) == (0.04, 0.0)


def test_nothing_is_stored_beside_an_uncertain_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    times(Stopwatch(timer=machine(spread=0.3)), "original")
    assert not list(tmp_path.rglob("*.json"))


def test_forms_timed_on_another_day_are_relative_to_the_same_original():
    times(Stopwatch(timer=machine()), "original", "half")
    timer = machine(5.0)
    timings = times(Stopwatch(timer=timer), "original", "half", "quarter")
    assert timer.rounds == [["original", "quarter"]], "the form that is new, beside the original"
    assert seconds(timings) == pytest.approx({"original": 20e-3, "half": 10e-3, "quarter": 5e-3})


def test_a_machine_that_slows_down_within_a_run_changes_no_sum():
    speed = {"slowdown": 1.0}

    def timer(variants, device, seconds):
        return machine(speed["slowdown"])(variants, device)

    stopwatch = Stopwatch(timer=timer)
    model = stopwatch.time_model(nn.Identity(), Inputs((torch.ones(1),)))
    one = times(stopwatch, "original", signature="one")
    speed["slowdown"] = 3.0
    other = times(stopwatch, "original", signature="other")
    assert model.seconds == pytest.approx(10e-3)
    assert one["original"].seconds == pytest.approx(4e-3)
    assert other["original"].seconds == pytest.approx(4e-3)
    again = stopwatch.time_model(nn.Identity(), Inputs((torch.ones(1),)))
    assert again.seconds == pytest.approx(10e-3)
    assert stopwatch.drift == pytest.approx(3)


def rough(repeats: int) -> FakeTimer:
    """Return a timer by which everything lasts as long as so many reference kernels."""
    return FakeTimer(lambda name, _: 1e-3 * repeats, kernel=1e-3)


@pytest.mark.parametrize(("longer", "repeats"), [(0.01, 1), (30, 30), (1e6, 1000)])
def test_the_kernel_lasts_as_long_as_what_it_is_timed_beside(longer, repeats):
    asked = []

    def timer(variants, device, seconds):
        if "original" in variants:
            asked.append(len(variants[REFERENCE].modules))
        return machine()(variants, device)

    timings = times(Stopwatch(timer=timer, rough=rough(longer)), "original", "half")
    assert asked == [repeats]
    assert seconds(timings) == pytest.approx({"original": 4e-3, "half": 2e-3}), "whatever the repeats"


def interrupted(variants, device, seconds):
    """A machine with other load, on which what lasts longer than the kernel takes three times its time."""
    timings = {}
    for name, call in variants.items():
        alone = 1e-3 * len(call.modules) if name in KERNELS else 10e-3
        timings[name] = Timing(alone if alone == 1e-3 else 3 * alone)
    first = next(iter(timings.values())).seconds
    return {name: Timing(timing.seconds, timing.seconds / first) for name, timing in timings.items()}


def test_other_load_shows_in_a_kernel_that_lasts_as_long_as_the_model():
    quiet, busy = (Stopwatch(timer=timer, rough=rough(10)) for timer in (machine(), interrupted))
    quiet.time_model(nn.Identity(), Inputs((torch.ones(1),)))
    assert quiet.load == 1
    model = busy.time_model(nn.Identity(), Inputs((torch.ones(1),)))
    assert (busy.load, model.seconds) == pytest.approx((3, 30e-3))
    assert times(busy, "original")["original"].seconds == pytest.approx(model.seconds), "both are slowed down alike"
    busy.rough = rough(1)
    assert times(busy, "original", signature="short")["original"].seconds != model.seconds


def test_the_spread_of_a_model_is_relative_to_its_time():
    model = Stopwatch(timer=machine(spread=2.0)).time_model(nn.Identity(), Inputs((torch.ones(1),)))
    assert model.spread == pytest.approx(2.0 / 10), "its ratio to the reference kernel is 10"


def test_entries_without_the_first_variant_are_measured_anew():
    times(Stopwatch(timer=machine()), "half", "quarter")
    timer = machine()
    timings = times(Stopwatch(timer=timer), "original", "half")
    assert timer.rounds == [["original", "half"]]
    assert timings["half"].ratio == 0.5


def test_variants_that_need_no_timing_are_not_made():
    made = []

    def make(name):
        made.append(name)
        return workload()

    stopwatch = Stopwatch(timer=machine())
    stopwatch.times("layer", CPU, {name: partial(make, name) for name in ("original", "half")})
    stopwatch.times("layer", CPU, {name: partial(make, name) for name in ("original", "half")})
    assert made == ["original", "half"]


def test_without_the_cache_nothing_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    timer = machine()
    for _ in range(2):
        times(Stopwatch(cached=False, timer=timer), "original")
    assert len(timer.rounds) == 2
    assert not list(tmp_path.iterdir())


def test_a_file_holds_ratios_and_the_seconds_of_the_kernel_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    times(Stopwatch(timer=machine()), "original", "half")
    (path,) = tmp_path.glob("latency/*.json")
    content = json.loads(path.read_text())
    assert content["timings"] == {"original": {"ratio": 1.0, "spread": 0.0}, "half": {"ratio": 0.5, "spread": 0.0}}
    assert content["reference"] == {"ratio": 0.25, "spread": 0.0}
    assert content["reference_seconds"] == 1e-3


def test_the_real_kernel_runs():
    (timing,) = times(Stopwatch(seconds=0.0), "original").values()
    assert timing.seconds > 0
