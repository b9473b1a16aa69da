from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.allocation.merges import mergeable
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.surgery import calls
from fxlrd.timing.groups import time_group
from fxlrd.timing.stopwatch import Stopwatch
from tests.support.models import Stage
from tests.support.timers import FakeTimer, WeightTimer


def chain() -> nn.Sequential:
    """A producer of 16 channels, a depthwise conv, and a linear layer that reads four features of each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)),
    )


def group_of(gm, name="0"):
    return mergeable(gm, calls(gm, name)[0], why_not_replaceable(gm, norms=True), (), stem=True)


def test_all_layers_of_a_group_are_timed_with_the_channels_that_are_retained():
    gm = capture(chain().eval(), torch.randn(2, 3, 9, 9))
    weights = 16 * (3 * 9) + 16 * 9 + 5 * 64
    timings = time_group(gm, group_of(gm), [16, 8, 4], Stopwatch(timer=WeightTimer(lambda _, count: float(count))))
    assert list(timings) == ["16", "8", "4"]
    assert [t.ratio for t in timings.values()] == pytest.approx([1, 0.5, 0.25])
    assert timings["16"].seconds == pytest.approx(weights)


def test_dtype_and_memory_format_are_those_of_the_model():
    model = chain().double().to(memory_format=torch.channels_last).eval()
    gm = capture(model, torch.randn(2, 3, 9, 9).double().to(memory_format=torch.channels_last))
    read = []

    def timer(variants, device, seconds):
        if "8" in variants:
            read.extend(inputs.args[0] for _, inputs in variants["8"].parts)
        return FakeTimer(lambda name, _: 1.0)(variants, device)

    time_group(gm, group_of(gm), [8], Stopwatch(timer=timer))
    assert [tuple(x.shape) for x in read] == [(2, 3, 9, 9), (2, 8, 7, 7), (2, 32)]
    assert {x.dtype for x in read} == {torch.float64}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in read[:2])


def test_ratios_to_another_number_of_channels_are_another_entry():
    gm = capture(chain().eval(), torch.randn(2, 3, 9, 9))
    timer = WeightTimer(lambda _, count: float(count))
    time_group(gm, group_of(gm), [16, 8], Stopwatch(timer=timer))
    (_, second) = time_group(gm, group_of(gm), [8, 4], Stopwatch(timer=timer)).values()
    assert second.ratio == pytest.approx(0.5)
    assert len(timer.rounds) == 2
    time_group(gm, group_of(gm), [16, 8], Stopwatch(timer=timer))
    assert len(timer.rounds) == 2, "both are on disk"


def test_a_layer_that_makes_several_parts_keeps_them_all():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.last = nn.Linear(8, 32), nn.Linear(16, 5)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, -1)
            return self.last(gate.sigmoid() * up)

    gm = capture(Gated().eval(), torch.randn(2, 8))
    timer = WeightTimer(lambda _, count: float(count))
    timings = time_group(gm, group_of(gm, "both"), [16, 8], Stopwatch(timer=timer))
    assert timings["16"].seconds == pytest.approx(32 * 8 + 5 * 16)
    assert timings["8"].ratio == pytest.approx(0.5)


def stream(gm):
    return mergeable(gm, calls(gm, "convs.0")[0], why_not_replaceable(gm, norms=True), (), sums=True)


def test_layers_of_a_stream_that_are_alike_are_one_module_that_is_called_again():
    gm = capture(Stage().eval(), torch.randn(2, 3, 9, 9))
    made = []

    def timer(variants, device, seconds):
        made.extend(variants[name] for name in ("16", "8") if name in variants)
        return FakeTimer(lambda name, _: 1.0)(variants, device)

    time_group(gm, stream(gm), [16, 8], Stopwatch(timer=timer))
    parts = made[-1].modules  # three that make channels, of which two are alike, and three that read them
    assert len(parts) == 6
    assert sorted(tuple(m.weight.shape[:2]) for m in set(parts)) == [(2, 8), (8, 3), (8, 16), (16, 8)]
