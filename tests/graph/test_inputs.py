from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch

from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import Inputs


def test_inputs_of():
    x = torch.ones(1)
    assert Inputs.of(x) == Inputs((x,), {})
    assert Inputs.of((x, 2)) == Inputs.of([x, 2]) == Inputs((x, 2), {})
    assert Inputs.of({"x": x}) == Inputs.of(UserDict(x=x)) == Inputs((), {"x": x})
    given = Inputs((x,), {"y": x})
    assert Inputs.of(given) is given
    assert copy.deepcopy(given) is given
    assert given.describe() == "float32[1] on cpu, float32[1] on cpu"
    assert Inputs((3,)).describe() == "no tensor"


@pytest.mark.parametrize("value", [None, 3, "x", {1, 2}])
def test_inputs_of_another_type(value):
    with pytest.raises(FxlrdError, match=rf"^example inputs: a {type(value).__name__} is not a tensor") as caught:
        Inputs.of(value)
    assert "\n" not in str(caught.value)


def test_a_larger_batch_has_the_rows_again():
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    larger = Inputs((x,), {"y": y}).enlarged(2, more=1)
    assert torch.equal(larger.kwargs["y"], torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    assert torch.equal(larger.args[0], x[larger.kwargs["y"]])
    assert Inputs((x, torch.ones(2))).enlarged(2) is None
    assert Inputs((torch.tensor(1.0),)).enlarged(2) is None
