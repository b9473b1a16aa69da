from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.graph.inputs import Inputs
from fxlrd.timing.models import device_of, time_models
from tests.support.timers import FakeTimer


class Noting(nn.Module):
    """A model that counts its calls in a buffer, and notes its mode and whether gradients were on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.noted = []

    def forward(self, x, scale=1):
        self.calls += 1
        x.mul_(2)
        self.noted.append((self.training, self.layer.training, torch.is_grad_enabled()))
        return scale * self.layer(x)


def timer() -> FakeTimer:
    return FakeTimer(lambda name, _: {"before": 2.0, "after": 1.0}[name])


def test_models_are_timed_side_by_side_in_eval_mode_without_gradients():
    before, after = Noting().train(), Noting().eval()
    times = time_models({"before": before, "after": after}, Inputs((torch.ones(2, 4),), {"scale": 3}), timer=timer())
    assert (times["before"].seconds, times["after"].ratio) == (2.0, 0.5)
    assert before.noted == after.noted == [(False, False, False)]


def test_models_and_inputs_are_afterwards_as_they_were():
    before, after, x = Noting().train(), Noting().train(), torch.ones(2, 4)
    after.layer.eval()
    time_models({"before": before, "after": after}, Inputs((x,)), timer=timer())
    assert float(before.calls) == float(after.calls) == 0
    assert (before.training, before.layer.training, after.training, after.layer.training) == (True, True, True, False)
    assert torch.equal(x, torch.ones(2, 4))


def test_the_real_timer_is_the_default():
    times = time_models({"before": nn.Linear(4, 4), "after": nn.Linear(4, 4)}, Inputs((torch.ones(2, 4),)), seconds=0.0)
    assert all(timing.seconds > 0 for timing in times.values())


@pytest.mark.parametrize("under_inductor", [False, True])
def test_under_inductor_each_model_is_compiled(monkeypatch, under_inductor):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda gm: compiled.append(gm) or gm)
    models = {"before": nn.Sequential(nn.Linear(4, 4)), "after": nn.Linear(4, 4)}
    time_models(models, Inputs((torch.ones(2, 4),)), under_inductor=under_inductor, timer=timer())
    assert len(compiled) == 2 * under_inductor


def test_a_model_without_parameters_runs_where_its_inputs_are():
    assert device_of(nn.ReLU(), Inputs((torch.ones(1, device="meta"),))) == torch.device("meta")
    assert device_of(nn.Linear(1, 1), Inputs((torch.ones(1, device="meta"),))) == torch.device("cpu")
