from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

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


class Merges(nn.Linear):
    """A layer whose train() does more than set a flag, as that of a LoRA layer."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_evaluating_sets_flags_and_calls_nothing_of_the_users():
    model = nn.Sequential(Merges(4, 4), nn.Dropout())
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not model[0].merged
    assert all(m.training for m in model.modules())


class Careless(nn.Module):
    """Changes whatever is global."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x):
        self.steps += 1
        self.graph = self.graph * 2
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        random.seed(3)
        torch.manual_seed(3)
        return x + torch.rand(1)


@pytest.fixture
def idle_worker():
    with ThreadPoolExecutor(1) as executor:  # as Inductor leaves some
        executor.submit(int).result()
        yield


@pytest.mark.usefixtures("idle_worker")
def test_run_leaves_buffers_settings_and_random_states_as_they_were():
    model = Careless()
    graph = model.graph
    state, python = torch.get_rng_state(), random.getstate()
    cudnn = torch.backends.cudnn.benchmark
    first, second = (run(model, Inputs.of(torch.zeros(1))) for _ in range(2))
    assert torch.equal(first, second)
    assert model.steps.item() == 0
    assert model.graph is graph
    assert torch.get_default_dtype() is torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark is cudnn
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
