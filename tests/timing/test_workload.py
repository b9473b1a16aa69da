from __future__ import annotations

import torch
from torch import nn

from fxlrd.graph.inputs import Inputs
from fxlrd.timing.workload import Workload, example, time_workloads
from tests.support.timers import FakeTimer

CPU = torch.device("cpu")


def test_a_workload_runs_each_of_its_modules_on_its_inputs():
    a, b, x = nn.Linear(3, 4), nn.Linear(2, 5), torch.ones(1, 3)
    workload = Workload([(a, Inputs((x,))), (b, Inputs((), {"input": torch.ones(1, 2)}))])
    assert workload.modules == [a, b]
    assert [t.shape for t in workload()] == [(1, 4), (1, 5)]


def test_workloads_run_in_eval_mode_and_modes_come_back():
    modes = []
    module = nn.Dropout()
    module.register_forward_hook(lambda m, *_: modes.append((m.training, torch.is_grad_enabled())))
    time_workloads({"a": Workload([(module, Inputs((torch.ones(1),)))])}, CPU, 1.0, FakeTimer(lambda *_: 1.0))
    assert modes == [(False, False)]
    assert module.training


def test_example_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    x = example((2, 3, 4, 5), torch.bfloat16, "channels_last", CPU)
    assert (x.shape, x.dtype) == ((2, 3, 4, 5), torch.bfloat16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    y = example((2, 3, 4, 5), torch.bfloat16, "contiguous", CPU)
    assert y.is_contiguous()
    assert torch.equal(x, y)
    assert torch.equal(torch.get_rng_state(), state)
