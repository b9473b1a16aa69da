"""No test here reads a clock: a fake timer's times are those that a test states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.graph.surgery import calls
from fxlrd.timing.clock import Timing
from fxlrd.timing.layers import ORIGINAL, SIZES, placed, time_ranks, together
from fxlrd.timing.stopwatch import Stopwatch
from tests.support.timers import FakeTimer, SizeTimer


@pytest.fixture
def timer() -> FakeTimer:
    """The original takes 10 s, a form as many as its rank, all of them a hundred more each time that they are timed."""
    return FakeTimer(lambda name, asked: (10.0 if name == ORIGINAL else float(name)) + 100 * asked)


def place(layer: nn.Module, x: torch.Tensor):
    gm = capture(nn.Sequential(layer).eval(), x)
    return placed(calls(gm, "0"), layer)


def test_a_place_is_the_input_that_the_layer_sees():
    x = torch.randn(2, 8, 5, 5).double().contiguous(memory_format=torch.channels_last)
    (where,) = place(nn.Conv2d(8, 8, 3).double().to(memory_format=torch.channels_last), x)
    assert (where.shape, where.dtype, where.layout) == ((2, 8, 5, 5), torch.float64, "channels_last")
    (other,) = place(nn.Conv2d(8, 8, 3), x.float())
    assert where.signature != other.signature
    (same,) = place(nn.Conv2d(8, 8, 3).double().to(memory_format=torch.channels_last), x)
    assert where.signature == same.signature


def test_without_shapes_it_says_what_is_missing():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    assert placed(calls(gm, "0"), gm.get_submodule("0")).code == "no-shapes"


def test_ratios_are_to_the_original_and_each_group_has_it(timer):
    ranks = [(r,) for r in range(12, 0, -1)]
    times = time_ranks(place(nn.Linear(32, 32), torch.randn(4, 32)), ranks, Stopwatch(cached=False, timer=timer))
    names = [str(r) for (r,) in ranks]
    assert timer.rounds == [[ORIGINAL, *names[:10]], [ORIGINAL, *names[10:]]]
    assert list(times) == [ORIGINAL, *names]
    assert times[ORIGINAL].seconds == 10.0, "the first measurement of the original is the one that counts"
    assert [times[name].ratio for name in names] == pytest.approx(
        [r / 10 for r in range(12, 2, -1)] + [102 / 110, 101 / 110]
    )


def test_a_layer_without_any_form_has_its_own_time(timer):
    where = place(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 9, 9))
    assert list(time_ranks(where, [], Stopwatch(cached=False, timer=timer))) == [ORIGINAL]
    assert timer.rounds == [[ORIGINAL]]


@pytest.mark.parametrize("cached", [False, True])
def test_what_was_measured_is_not_measured_again(timer, cached):
    where, stopwatch = place(nn.Linear(32, 32), torch.randn(4, 32)), Stopwatch(cached=cached, timer=timer)
    time_ranks(where, [(8,)], stopwatch)
    first = time_ranks(where, [(8,), (4,)], stopwatch)
    assert time_ranks(where, [], stopwatch) == {ORIGINAL: first[ORIGINAL]}
    assert timer.rounds == [[ORIGINAL, "8"], [ORIGINAL, "4"]]
    again = time_ranks(where, [(4,), (8,)], Stopwatch(cached=cached, timer=timer))
    assert len(timer.rounds) == (2 if cached else 3), "another search finds it on disk, if it may look there"
    assert (again == first) == cached


def test_the_original_is_the_users_module_and_keeps_its_mode(timer):
    where = place(nn.Linear(32, 32), torch.randn(4, 32))
    (layer,) = (each.original for each in where)
    layer.train()
    time_ranks(where, [(8,)], Stopwatch(cached=False, timer=timer))
    assert layer.training


class Pyramid(nn.Module):
    """A head that is called on two levels of a pyramid, on the smaller one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = nn.functional.avg_pool2d(x, 4)
        return self.head(x).mean() + self.head(small).mean() + self.head(small + 1).mean()


def test_the_time_of_a_layer_is_that_of_all_its_calls():
    gm = capture(Pyramid().eval(), torch.randn(1, 8, 16, 16))
    where = placed(calls(gm, "head"), gm.get_submodule("head"))
    assert [(each.shape[-1], each.count) for each in where] == [(16, 1), (4, 2)]
    seconds = {(ORIGINAL, 16): 10.0, (ORIGINAL, 4): 1.0, ("4x4", 16): 5.0, ("4x4", 4): 3.0}
    timer = SizeTimer(lambda name, size: seconds[name, size], spread=0.1)
    times = time_ranks(where, [(4, 4)], Stopwatch(cached=False, timer=timer))
    assert times[ORIGINAL].seconds == pytest.approx(10 + 1 + 1)
    assert times["4x4"].seconds == pytest.approx(5 + 3 + 3)
    assert times["4x4"].ratio == pytest.approx(11 / 12)
    assert times["4x4"].spread == pytest.approx(0.1 * (10**2 + 2**2) ** 0.5 / 12), "one measurement of the small size"
    assert [sorted(names) for names in timer.rounds] == [["4x4", ORIGINAL]] * 2, "each size once"


def test_a_node_stands_for_as_many_calls_as_it_says():
    timings = {ORIGINAL: Timing(2.0, 1.0, 0.0), "8": Timing(1.0, 0.5, 0.1)}
    others = {ORIGINAL: Timing(4.0, 1.0, 0.0), "8": Timing(8.0, 2.0, 0.2)}
    summed = together([(3, timings), (1, others)])
    assert summed[ORIGINAL] == Timing(10.0, 1.0, 0.0)
    assert (summed["8"].seconds, summed["8"].ratio) == (11.0, pytest.approx(1.1))
    assert summed["8"].spread == pytest.approx((0.6**2 + 0.8**2) ** 0.5 / 10)


class Growing(nn.Module):
    """A layer that reads one row, then two, and so on: as often each as ``repeats`` says."""

    def __init__(self, sizes: int, repeats: int) -> None:
        super().__init__()
        self.layer, self.sizes, self.repeats = nn.Linear(6, 6), sizes, repeats

    def forward(self, x):
        return sum(self.layer(x[:, : i + 1]).sum(1) for i in range(self.sizes) for _ in range(self.repeats))


@pytest.mark.parametrize(("sizes", "repeats"), [(3, 2), (SIZES, 1), (SIZES + 1, 1), (40, 3)])
def test_of_many_sizes_some_stand_for_all(sizes, repeats):
    gm = capture(Growing(sizes, repeats), torch.randn(2, sizes, 6))
    where = placed(calls(gm, "layer"), gm.get_submodule("layer"))
    assert len(where) == min(sizes, SIZES)
    assert sum(each.count for each in where) == sizes * repeats
    rows = sum(each.count * each.shape[1] for each in where)
    assert rows == pytest.approx(repeats * sizes * (sizes + 1) / 2, rel=0.1)


def test_under_inductor_the_modules_are_compiled(timer, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda gm: compiled.append(gm) or gm)
    time_ranks(place(nn.Linear(32, 32), torch.randn(4, 32)), [(8,)], Stopwatch(True, cached=False, timer=timer))
    assert len(compiled) == 2
