from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.timing.branches import time_branches
from fxlrd.timing.stopwatch import REFERENCE, Stopwatch
from tests.support.timers import FakeTimer


@pytest.mark.parametrize("core", [nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(6, 8, 2, stride=2), nn.Conv1d(7, 10, 3)])
def test_timed_cores_read_and_make_the_multiples_below_their_ranks(core):
    parts = {}

    def timer(variants, device, seconds):
        for name in variants.keys() - {REFERENCE}:
            (module,) = variants[name].modules
            parts[name] = (module.groups, module.in_channels, module.out_channels, type(module) is type(core))
        return FakeTimer(lambda name, _: 1.0)(variants, device)

    gm = capture(nn.Sequential(core).eval(), torch.randn(2, core.in_channels, *[9] * (core.weight.dim() - 2)))
    (node,) = (n for n in gm.graph.nodes if n.op == "call_module")
    time_branches([node], core, [1, 2, 4], Stopwatch(timer=timer))
    c_in, c_out = core.in_channels, core.out_channels
    assert parts == {str(n): (n, c_in // n * n, c_out // n * n, True) for n in (1, 2, 4)}
