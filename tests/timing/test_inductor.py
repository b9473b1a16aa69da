from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.timing.inductor import compiled


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
