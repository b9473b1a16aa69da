"""What acts on each entry or each channel by itself."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxlrd.graph.operations import is_elementwise, is_flatten

OPERATIONS = {
    "relu": (lambda x: torch.relu(x), True, False),
    "method": (lambda x: x.sigmoid(), True, False),
    "scalar": (lambda x: x * 2, True, False),
    "scalar first": (lambda x: 1 - x, True, False),
    "division": (lambda x: x / 6, True, False),
    "in place": (lambda x: x.clone().mul(1).relu_(), True, False),
    "two tensors": (lambda x: x * x.flip(0), False, False),
    "softmax": (lambda x: x.softmax(1), False, False),
    "sum": (lambda x: x.sum(1), False, False),
    "flatten": (lambda x: x.flatten(1), False, True),
    "named": (lambda x: x.flatten(start_dim=1), False, True),
    "function": (lambda x: torch.flatten(x, 1, -1), False, True),
    "view": (lambda x: x.view(x.size(0), -1), False, True),
    "named size": (lambda x: x.view(x.size(dim=0), -1), False, True),
    "reshape": (lambda x: x.reshape(x.shape[0], -1), False, True),
    "spatial": (lambda x: x.flatten(2), False, False),
    "all": (lambda x: x.flatten(), False, False),
    "fixed": (lambda x: x.view(-1, 12), False, False),
    "by channel": (lambda x: x.view(x.size(1), -1), False, False),
    "by width": (lambda x: x.reshape(x.shape[3], -1), False, False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_kind_of_operation_it_is(name):
    f, elementwise, flatten = OPERATIONS[name]

    class Model(nn.Module):
        def forward(self, x):
            return f(x)

    gm = fx.symbolic_trace(Model())
    (output,) = gm.graph.find_nodes(op="output")
    node = output.args[0]
    assert is_elementwise(gm, node) == elementwise
    assert is_flatten(gm, node) == flatten
