from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.allocation.merges import mergeable
from fxlrd.graph.facts import record_times
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.surgery import calls
from fxlrd.timing.groups import time_between, time_group
from fxlrd.timing.stopwatch import Stopwatch
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


class Stage(nn.Module):
    """Two blocks that add to a stream: relu(bn(conv(relu(x))) + x)."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

    def forward(self, x):
        x = self.into(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)) + x)
        return self.out(x)


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


def test_what_is_between_layers_is_run_whole():
    gm = capture(Stage().eval(), torch.randn(2, 3, 9, 9))
    ran = []

    def timer(variants, device, seconds):
        if "all" in variants:
            ((module, inputs),) = variants["all"].parts
            ran.append((module, inputs))
        return FakeTimer(lambda name, _: 5.0)(variants, device)

    assert time_between(gm, stream(gm), Stopwatch(timer=timer)) == pytest.approx(5.0)
    module, inputs = ran[0]
    into, *made = inputs.args
    assert [tuple(x.shape) for x in inputs.args] == [(2, 16, 9, 9)] * 3
    first = torch.relu(gm.get_submodule("norms.0")(made[0]) + into)
    seen, last = module(*inputs.args)
    assert torch.equal(seen, first)
    assert torch.equal(last, torch.relu(gm.get_submodule("norms.1")(made[1]) + first))
    assert time_between(gm, stream(gm), Stopwatch(timer=timer)) == pytest.approx(5.0)
    assert len({id(module) for module, _ in ran}) == 1, "from the cache"


def test_what_stands_between_is_told_from_other_such():
    texts = set()
    for norm in (nn.BatchNorm2d(16), nn.Identity()):
        for act in (nn.ReLU(), nn.GELU()):
            model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, act, nn.Conv2d(16, 2, 1)).eval()
            gm = capture(model, torch.randn(2, 3, 9, 9))
            stopwatch = Stopwatch(timer=FakeTimer(lambda name, _: 1.0))
            time_between(gm, group_of(gm), stopwatch)
            texts |= {signature for _, signature in stopwatch._entries}
    assert len(texts) == 4
    gm = capture(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)).eval(), torch.randn(2, 3, 9, 9))
    assert time_between(gm, group_of(gm), Stopwatch(timer=FakeTimer(lambda name, _: 1.0))) == 0.0


def test_sizes_that_are_read_between_layers_are_computed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 2)

        def forward(self, x):
            y = self.pool(self.conv(x).relu())
            return self.fc(y.view(y.size(0), -1))

    gm = capture(Net().eval(), torch.randn(2, 3, 9, 9))
    assert time_between(gm, group_of(gm, "conv"), Stopwatch(timer=FakeTimer(lambda name, _: 2.0))) == pytest.approx(2.0)


def test_what_stands_for_several_calls_takes_as_many_times_as_long():
    gm = capture(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval(), torch.randn(2, 3, 9, 9))
    for each in gm.graph.nodes:
        record_times(each, 3)
    assert time_between(gm, group_of(gm), Stopwatch(timer=FakeTimer(lambda name, _: 2.0))) == pytest.approx(6.0)
