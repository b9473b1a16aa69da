from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlrd.capturing.multiplied import NotingMultiplied, without_layer
from fxlrd.capturing.regions import capture_regions
from fxlrd.capturing.whole import capture
from fxlrd.graph.captured import captured
from fxlrd.graph.layer import layers_of
from tests.support.experts import Experts

X = torch.linspace(-1, 1, 48).reshape(6, 8)


def multiplied(model, *inputs):
    """Return the names of the parameters that a model multiplies with and that no layer of it holds."""
    with torch.no_grad(), NotingMultiplied(model) as noting:
        model(*inputs)
    return set(without_layer(model, noting.names))


class Uses(nn.Module):
    """A model whose forward is a function of the module and the inputs, with parameters of the given shapes."""

    def __init__(self, forward, **shapes):
        super().__init__()
        self.call, self.fc = forward, nn.Linear(8, 8)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)))

    def forward(self, *args):
        return self.call(self, *args)


@pytest.mark.parametrize("gathered", [False, True])
def test_experts_in_one_tensor_are_multiplied_with(gathered):
    entries = captured(capture_regions(Experts(gathered), X)).unreached
    assert {name: (e.op, e.shape, e.params, e.reason.code) for name, e in entries.items()} == {
        "experts.gate_up": ("ExpertWeights", (4, 24, 8), 768, "no-layer"),
        "experts.down": ("ExpertWeights", (4, 8, 12), 384, "no-layer"),
        "router": ("Experts", (4, 8), 32, "no-layer"),
    }


def test_a_capture_as_a_whole_names_them_too():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.w = nn.Linear(8, 8), nn.Parameter(torch.ones(3, 8))

        def forward(self, x):
            return self.fc(x) @ self.w.mT

    gm = capture(Product().eval(), X)
    assert [layer.name for layer in layers_of(gm)] == ["fc"]
    assert captured(gm).unreached["w"].op == "Product"


@pytest.mark.parametrize(
    ("module", "inputs", "names"),
    [
        (nn.LSTM(8, 4), (X,), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.GRUCell(8, 4), (X,), {"weight_ih", "weight_hh"}),
        (nn.Bilinear(8, 8, 4), (X, X), {"weight"}),
        (nn.Embedding(8, 4), (torch.arange(3),), set()),
        (nn.LayerNorm((6, 8)), (X,), set()),
    ],
)
def test_of_modules_of_torch_their_matrices(module, inputs, names):
    assert multiplied(module, *inputs) == names


def test_what_is_cast_packed_or_cut_before_it_is_multiplied_with():
    def forward(m, x):
        query, key = torch.cat([m.q, m.k]).double().chunk(2)
        return F.linear(x.double(), query) + x.double() @ (m.cut[:, :8] * 2).double() + F.linear(x.double(), key)

    assert multiplied(Uses(forward, q=(8, 8), k=(8, 8), cut=(8, 9)), X) == {"q", "k", "cut"}


def test_tables_inputs_that_are_learned_and_the_weights_of_layers_are_not():
    def forward(m, index, x):
        learned = m.fc(m.queries + m.positions)
        merged = F.linear(x, m.fc.weight + m.fc.weight)
        return learned.sum() + merged.sum() + (m.table[index] @ m.fc(x).mT).sum()

    model = Uses(forward, queries=(5, 8), positions=(5, 8), table=(9, 8))
    assert multiplied(model, torch.arange(5), X) == set()
