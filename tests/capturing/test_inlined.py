"""Layers whose weight forward gives to a function itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlrd
from tests.support.compression import decisions, layer_reasons


class Reading(nn.Module):
    """A forward that gives the weight of ``layer`` to a function, between two layers that are called."""

    def __init__(self, layer, product):
        super().__init__()
        self.before = type(layer)(16, 16, *([1] if isinstance(layer, nn.Conv2d) else []))
        self.layer, self.product = copy.deepcopy(layer), product
        if product is put_together:
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.product(self, self.before(x)).relu()


def put_together(self, x):
    bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
    return F.linear(x, weight=self.layer.weight, bias=bias)


LINEAR = {
    "a bias put together": (nn.Linear(16, 24, bias=False), put_together),
    "its own bias": (nn.Linear(16, 24), lambda self, x: F.linear(x, self.layer.weight, self.layer.bias)),
    "no bias": (nn.Linear(16, 24, bias=False), lambda self, x: F.linear(x, self.layer.weight)),
    "T": (nn.Linear(16, 24, bias=False), lambda self, x: x @ self.layer.weight.T + 1),
    "t": (nn.Linear(16, 24, bias=False), lambda self, x: torch.matmul(x, self.layer.weight.t())),
    "transpose": (nn.Linear(16, 24, bias=False), lambda self, x: x.matmul(self.layer.weight.transpose(-2, -1))),
    "called as well": (
        nn.Linear(16, 16, bias=False),
        lambda self, x: self.layer(F.linear(x, self.layer.weight, self.before.bias)),
    ),
}
CONV = {
    "conv": (
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        lambda self, x: F.conv2d(x, self.layer.weight, self.layer.bias, 2, padding=(1, 1)),
    ),
}
CASES = {
    **{name: (*case, (5, 16)) for name, case in LINEAR.items()},
    **{name: (*case, (2, 16, 9, 9)) for name, case in CONV.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_a_product_with_a_layers_weight_is_a_call_of_the_layer(case):
    layer, product, shape = CASES[case]
    model = Reading(layer, product).double().eval()
    x, other = torch.randn(shape).double(), torch.randn(shape).double()
    result = fxlrd.compress(model, x, pipeline="decompose{ranks=99}", measure=False)
    assert set(decisions(result)) == {"before", "layer"}
    assert decisions(result)["layer"] in ("svd", "tucker2")
    assert result.report.before["params"] == sum(p.numel() for p in model.parameters())
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())
    torch.testing.assert_close(result.model(other), model(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "product", "shape"),
    [
        (nn.Linear(16, 24), lambda self, x: F.linear(x, self.layer.weight), (5, 16)),
        (nn.Linear(16, 16, bias=False), lambda self, x: x @ self.layer.weight, (5, 16)),
        (nn.Linear(16, 24, bias=False), lambda self, x: F.linear(x, self.layer.weight * 2), (5, 16)),
        (
            nn.Conv2d(16, 24, 3, padding=1),
            lambda self, x: F.conv2d(x, self.layer.weight, self.layer.bias, 2, 1),
            (2, 16, 9, 9),
        ),
    ],
)
def test_a_product_that_no_call_of_the_layer_gives_stays(layer, product, shape):
    model = Reading(layer, product).eval()
    result = fxlrd.compress(model, torch.randn(shape), ratio=2, measure=False)
    assert decisions(result)["layer"] == "skipped"
    other = torch.randn(shape)
    with torch.no_grad():
        full = fxlrd.compress(model, other, pipeline="decompose{ranks=99}", measure=False).model
        torch.testing.assert_close(full(other), model(other), rtol=1e-4, atol=1e-4)


def test_in_place_the_users_forward_reads_the_weight():
    layer, product, shape = CASES["a bias put together"]
    model = Reading(layer, product).double().eval()
    x = torch.randn(shape).double()
    expected = model(x).detach()
    result = fxlrd.compress(model, x, pipeline="decompose{ranks=99}", measure=False, inplace=True)
    assert decisions(result) == {"before": "svd", "layer": "skipped"}
    assert "is read by linear directly" in layer_reasons(result)["layer"]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_a_checkpoint_of_such_a_graph_loads(tmp_path):
    layer, product, shape = CASES["a bias put together"]
    model = Reading(layer, product).eval()
    result = fxlrd.compress(model, torch.randn(shape), ratio=2, measure=False)
    fxlrd.save(result, tmp_path)
    loaded, other = fxlrd.load(tmp_path, copy.deepcopy(model).to("meta")), torch.randn(shape)
    assert torch.equal(loaded(other), result.model(other))
