from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.allocation.merges import mergeable
from fxlrd.graph.facts import record_times
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.surgery import calls
from fxlrd.timing.between import time_between
from fxlrd.timing.stopwatch import Stopwatch
from tests.support.models import Stage
from tests.support.timers import FakeTimer


def group_of(gm, name="0", sums=False):
    return mergeable(gm, calls(gm, name)[0], why_not_replaceable(gm, norms=True), (), stem=True, sums=sums)


def test_what_is_between_layers_is_run_whole():
    gm = capture(Stage().eval(), torch.randn(2, 3, 9, 9))
    ran = []

    def timer(variants, device, seconds):
        if "all" in variants:
            ((module, inputs),) = variants["all"].parts
            ran.append((module, inputs))
        return FakeTimer(lambda name, _: 5.0)(variants, device)

    assert time_between(gm, group_of(gm, "convs.0", sums=True), Stopwatch(timer=timer)) == pytest.approx(5.0)
    module, inputs = ran[0]
    into, *made = inputs.args
    assert [tuple(x.shape) for x in inputs.args] == [(2, 16, 9, 9)] * 3
    first = torch.relu(gm.get_submodule("norms.0")(made[0]) + into)
    seen, last = module(*inputs.args)
    assert torch.equal(seen, first)
    assert torch.equal(last, torch.relu(gm.get_submodule("norms.1")(made[1]) + first))
    assert time_between(gm, group_of(gm, "convs.0", sums=True), Stopwatch(timer=timer)) == pytest.approx(5.0)
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
