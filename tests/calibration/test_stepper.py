from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, capture
from fxlrd.calibration.stepper import Stepper
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import calls
from tests.support.tensors import assert_close


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 2)).double().eval()


def batches(count: int) -> list[Inputs]:
    return [Inputs((torch.randn(6, 4).double(),)) for _ in range(count)]


def test_it_stops_before_a_node_and_behind_it():
    model, inputs = net(), batches(3)
    gm = capture(model, inputs[0])
    (tanh,), (second,) = calls(gm, "1"), calls(gm, "2")
    stepper = Stepper(gm, inputs)
    with torch.no_grad():
        stepper.before(second)
        for value, each in zip(stepper.values(tanh), inputs, strict=True):
            assert_close(value, model[:2](each.args[0]))
        stepper.before(second)
        stepper.through(second)
        for value, each in zip(stepper.values(second), inputs, strict=True):
            assert_close(value, model[:3](each.args[0]))


def test_a_module_that_is_replaced_on_the_way_counts_from_then_on():
    model, (inputs,) = net(), batches(1)
    gm = capture(model, inputs)
    (third,) = calls(gm, "3")
    stepper = Stepper(gm, [inputs])
    with torch.no_grad():
        stepper.before(third)
        gm.set_submodule("3", nn.Identity())
        stepper.through(third)
        assert_close(stepper.values(third)[0], model[:3](inputs.args[0]))


def test_a_value_is_dropped_after_its_last_use():
    (inputs,) = batches(1)
    gm = capture(net(), inputs)
    (second,) = calls(gm, "2")
    stepper = Stepper(gm, [inputs])
    stepper.through(second)
    with pytest.raises(KeyError):
        stepper.values(calls(gm, "1")[0])


def test_a_batch_that_the_model_fails_on_is_named():
    inputs = [*batches(1), Inputs((torch.randn(6, 3).double(),))]
    gm = capture(net(), inputs[0])
    with pytest.raises(FxlrdError, match=r"^calibration: the model fails on batch 1 ") as error:
        Stepper(gm, inputs).before(calls(gm, "2")[0])
    assert "\n" not in str(error.value)
