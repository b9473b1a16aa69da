from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.allocation.trials import Trial, measure
from fxlrd.calibration.metric import squared_error
from fxlrd.capturing.model import capture_any
from fxlrd.graph.captured import runnable
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.layers.build import decomposed
from fxlrd.progress import quiet


class Residual(nn.Module):
    """Blocks around a shortcut that an operation in place writes to, one layer that is called twice, two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        y += x
        y.mul_(0.5)
        z = self.c(self.c(y).tanh())
        return {"y": y.sum(1), "z": z}


class Branching(Residual):
    """The same with a branch that no trace gets past."""

    def forward(self, x):
        if x.sum() > 1e6:
            return {}
        return super().forward(x)


def batches():
    return [Inputs((torch.randn(5, 12).double(),)) for _ in range(3)]


@pytest.mark.parametrize("kind", [Residual, Branching])
def test_the_error_is_that_of_a_model_with_this_one_change(kind):
    model, inputs = kind().double().eval(), batches()
    gm = capture_any(model, inputs[0])
    layers = {name: gm.get_submodule(name) for name in "abc"}
    changes = {name: [{name: decomposed(m, (r,))[0]} for r in (2, 5)] for name, m in layers.items()}
    changes["b"].append({"b": nn.Linear(12, 12).double(), "c": layers["c"]})
    trials = [
        Trial(name, tuple(changes[name][-1]), (), tuple((lambda m=modules: m) for modules in changes[name]))
        for name in ("c", "b", "a")
    ]
    before = [t.clone() for t in model.parameters()]
    found = measure(gm, inputs, trials, quiet)
    assert [len(each) for each in found] == [2, 3, 2]
    for trial, errors in zip(trials, found, strict=True):
        for modules, error in zip(changes[trial.name], errors, strict=True):
            changed = kind().double().eval()
            changed.load_state_dict(model.state_dict())
            for name, module in modules.items():
                changed.set_submodule(name, module)
            each = [squared_error(tensors(changed(*i.args)), tensors(model(*i.args))) for i in inputs]
            assert error == pytest.approx(sum(each) / 3, rel=1e-9)
    assert measure(gm, inputs, trials[::-1], quiet) == found[::-1], "in any order, and again"
    assert all(bool((t == p).all()) for t, p in zip(before, model.parameters(), strict=True))
    same = tensors(runnable(gm)(*inputs[0].args)), tensors(model(*inputs[0].args))
    assert squared_error(*same) < 1e-25


def test_the_relative_squared_error():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
    mask = torch.tensor([-torch.inf, 1.0])
    assert squared_error([b, mask, torch.tensor([1])], [a, mask, torch.tensor([2])]) == pytest.approx(1 / 25)
    assert squared_error([a], [0 * a]) == 0.0
    assert squared_error([a], [a, b]) == squared_error([a[:1]], [a]) == torch.inf
    assert squared_error([torch.tensor([torch.nan])], [torch.tensor([1.0])]) != 0.0
