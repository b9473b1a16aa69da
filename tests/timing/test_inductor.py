from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from fxlrd.graph.inputs import Inputs
from fxlrd.timing.inductor import compiled
from fxlrd.timing.models import time_models


def test_compiled_has_a_code_object_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda gm: asked.append(gm) or gm)
    module = nn.Sequential(nn.Linear(4, 4)).eval()
    calls = [compiled(module) for _ in range(2)]
    assert type(asked[0]).forward.__code__ is not type(asked[1]).forward.__code__
    x = torch.randn(2, 4)
    assert all(torch.equal(call(x), module(x)) for call in calls)


@pytest.mark.slow
def test_compiled_really_freezes_the_weights():
    module, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    call = compiled(module)
    with torch.no_grad():
        before = call(x)
        module[0].weight.zero_()
        assert torch.equal(call(x), before), "the weights are constants of the compiled code"
    assert not torch._inductor.config.freezing


@pytest.mark.slow
def test_timing_a_model_again_takes_no_more_memory():
    def alive() -> int:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return sum(each.numel() == 37 * 41 for each in tensors)

    model, x = nn.Sequential(nn.Linear(37, 41), nn.ReLU()).eval(), torch.randn(2, 37)
    counts = []
    for _ in range(4):
        time_models({"model": model}, Inputs((x,)), under_inductor=True, seconds=0.01)
        counts.append(alive())
    assert counts[-1] < counts[0] + 3, "torch retains the latest, Inductor each that it loads, with weights"
