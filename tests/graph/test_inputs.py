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
