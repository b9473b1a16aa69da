from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import evaluating, run
from tests.support.models import StemCalledTwice


def test_evaluating_restores_each_mode_also_after_an_exception():
    model = StemCalledTwice().train()
    model.body[1].eval()
    model.head.eval()
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == modes


def test_run_names_what_does_not_fit():
    with pytest.raises(FxlrdError) as caught:
        run(nn.Linear(4, 4).double(), Inputs((torch.ones(2, 3),)))
    message = str(caught.value)
    assert message.startswith("the model fails on the example inputs (float32[2, 3] on cpu): ")
    assert "the model's weights are float64 on cpu" in message
    assert "\n" not in message
