"""Models that are quantized: one line says what to do first, before and after compression."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fxlrd
from fxlrd import FxlrdError
from fxlrd.layers.quantized import quantized_weight
from tests.support.compression import quick


class Packed(nn.Module):
    """As the layers of GPTQ and AWQ: no weight, several values in one integer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))

    def forward(self, x):
        return x


def wrapped() -> nn.Module:
    """As torchao does it: the class of the layer stays, its weight holds other tensors."""
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()), requires_grad=False)
    return layer


def integers() -> nn.Module:
    """As bitsandbytes does it."""
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(layer.weight.detach().char(), requires_grad=False)
    return layer


@pytest.mark.parametrize(("make", "kind"), [(wrapped, "TwoTensor"), (integers, "int8"), (Packed, "int32")])
def test_compress_and_save_say_what_to_do_first(make, kind, tmp_path):
    x = torch.randn(2, 64)
    with pytest.raises(FxlrdError, match=rf"^1\.\w+ \({kind}\) is quantized: compress the model first"):
        quick(nn.Sequential(nn.Linear(64, 64), make()), x)
    result = quick(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), x)
    result.model.set_submodule("0.first", make())
    with pytest.raises(FxlrdError, match=rf"^save: 0\.first\.\w+ \({kind}\) is quantized: save the result of compress"):
        fxlrd.save(result, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_integers_that_are_no_weights_of_layers_are_data():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("positions", torch.arange(4))
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    assert quantized_weight(model) is None
