"""What a module is, its behaviour decides: which stock layer computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlrd.layers.folded import is_layer
from fxlrd.layers.stand_ins import stand_in
from tests.support.clothes import CLOTHES, Fixed, SamePadded, StandardisedConv, TransposedLinear


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0001


class Detached(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.detach(), self.bias)


class DoubledInTraining(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Dropping(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class WithScale(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class InPairs(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class OfTwo(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Router(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sizes[::-1]))

    def forward(self, x):
        return F.linear(x, self.weight).softmax(-1)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", CLOTHES)
def test_a_module_that_computes_what_a_linear_does_is_one_around_its_own_tensors(cls, dtype):
    torch.manual_seed(0)
    module = cls(6, 4).to(dtype)
    layer = stand_in(module)
    assert type(layer) is nn.Linear
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert {p.data_ptr() for p in layer.parameters()} == {p.data_ptr() for p in module.parameters()}
    x = torch.randn(5, 6, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), module(x), rtol=0, atol=50 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cls", [Scaled, Detached, DoubledInTraining, Dropping, Clamped, Counting, WithScale, InPairs, OfTwo, Router]
)
def test_a_module_that_computes_something_else_is_none(cls, dtype):
    assert stand_in(cls(6, 6).to(dtype)) is None


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(4, 6), nn.LayerNorm((4, 6)), nn.Bilinear(3, 4, 5), nn.LSTM(4, 4), nn.ReLU()],
    ids=lambda m: type(m).__name__,
)
def test_modules_of_torch_that_are_no_layer(module):
    assert not is_layer(module)
    assert stand_in(module) is None


def test_a_stock_layer_stands_in_for_itself():
    module = nn.Conv2d(3, 4, 3)
    assert stand_in(module) is module


def test_a_weight_of_zeros_does_not_hide_what_the_forward_does():
    scaled, fixed = Scaled(6, 6), Fixed(6, 6)
    for module in (scaled, fixed):
        nn.init.zeros_(module.weight)
    assert stand_in(scaled) is None
    assert stand_in(fixed) is not None


def test_instances_of_one_class_that_are_made_in_two_ways_are_told_apart():
    class Either(nn.Linear):
        def __init__(self, scale):
            super().__init__(6, 6)
            self.scale = scale

        def forward(self, x):
            return super().forward(x) * self.scale

    assert [stand_in(Either(scale)) is not None for scale in (1.0, 2.0, 1.0)] == [True, False, True]


@pytest.mark.parametrize(("kernel", "stride", "alike"), [(3, 1, True), (1, 2, True), (3, 2, False), (4, 1, False)])
def test_padding_by_the_inputs_size_is_stock_where_it_does_not_depend_on_that(kernel, stride, alike):
    module = SamePadded(4, 6, kernel, stride).double()
    layer = stand_in(module)
    assert (layer is not None) is alike
    for size in (7, 8) if alike else ():
        x = torch.randn(2, 4, size, size, dtype=torch.float64)
        torch.testing.assert_close(layer(x), module(x), rtol=0, atol=50 * torch.finfo(x.dtype).eps)


def test_a_conv_of_another_weight_than_its_own_is_none():
    assert stand_in(StandardisedConv(4, 6, 3)) is None


def test_nothing_is_left_on_the_module_and_random_numbers_go_on():
    module = TransposedLinear(6, 4)
    state = {**vars(module), "_parameters": dict(module._parameters)}
    before = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    stand_in(module)
    assert vars(module) == state
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
