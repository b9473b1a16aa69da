from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlrd.layers.folded import fold, is_layer
from fxlrd.layers.kinds import is_stock
from fxlrd.layers.padding import FixedPadding, SamePadding
from tests.support.folding import CausalConv, MaskedLinear, SameConv, ScaledLinear, StandardisedConv

LAYERS = {
    "standardised": (lambda: StandardisedConv(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7)),
    "standardised, grouped": (lambda: StandardisedConv(6, 8, (3, 1), groups=2, bias=False), (2, 6, 9, 7)),
    "scaled": (lambda: ScaledLinear(6, 8), (4, 5, 6)),
    "masked": (lambda: MaskedLinear(6, 8), (4, 6)),
    "same": (lambda: SameConv(6, 8, 3, stride=2), (2, 6, 8, 8)),
    "same, uneven": (lambda: SameConv(6, 8, (5, 4), stride=(2, 3), dilation=(1, 2)), (2, 6, 13, 12)),
    "causal": (lambda: CausalConv(6, 8, 3), (2, 6, 11)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("larger", [0, 1, 2, 3])
def test_the_stock_layer_gives_the_modules_output_at_every_size(name, larger):
    make, shape = LAYERS[name]
    module = make().double()
    folded = fold(module)
    assert is_layer(module)
    assert is_stock(folded.layer)
    x = (
        torch.randn(*shape[:2], *(size + larger for size in shape[2:])).double()
        if len(shape) > 3
        else torch.randn(shape).double()
    )
    padded = x if folded.padding is None else folded.padding.apply(x)
    torch.testing.assert_close(folded.layer(padded), module(x), rtol=1e-12, atol=1e-12)


def test_parameters_that_are_used_as_they_are_are_the_modules_own():
    same, standardised = SameConv(6, 8, 3, stride=2), StandardisedConv(6, 8, 3)
    assert fold(same).layer.weight is same.weight
    assert fold(same).padding == SamePadding((3, 3), (2, 2))
    assert fold(standardised).layer.bias is standardised.bias
    assert fold(standardised).layer.weight is not standardised.weight
    assert fold(standardised).padding is None
    assert fold(CausalConv(6, 8, 3)).padding == FixedPadding((2, 0))


class Dynamic(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * x.mean(), self.bias)


class DropConnect(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias).relu()


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight * 2), self.weight)


class Clipping(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.1, 0.1)
        return F.linear(x, self.weight, self.bias)


class Rounded(nn.Linear):
    """It quantizes its input: no layer gives that."""

    def forward(self, x):
        return F.linear((x * 8).round() / 8, self.weight * 2, self.bias)


class OddPadding(nn.Conv2d):
    """Its padding is neither fixed nor TensorFlow's."""

    def forward(self, x):
        return super().forward(F.pad(x, (x.shape[-1] // 2, 0)))


class Reshaping(nn.Linear):
    def forward(self, x):
        return F.linear(x.reshape(-1, self.in_features), self.weight * 2).view(*x.shape[:-1], -1) + 0


class Contiguous(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x.contiguous() * 1, self.weight * 2, self.bias)


@pytest.mark.parametrize("module", [Reshaping(6, 8), Contiguous(6, 8, 1)])
def test_an_input_that_is_another_tensor_of_the_same_values_is_not_padded(module):
    assert fold(module).padding is None
    assert torch.equal(fold(module).layer.weight, module.weight * 2)


@pytest.mark.parametrize(
    "module",
    [
        *(cls(6, 6) for cls in (Dynamic, DropConnect, Activated, Twice, Clipping, Rounded)),
        *(OddPadding(6, 6, 3), nn.Linear(6, 6), nn.Conv2d(6, 6, 3), nn.LayerNorm((3, 6)), nn.Embedding(6, 6)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_no_layer_around_a_weight_is_not_folded(module):
    before = {name: t.clone() for name, t in module.state_dict().items()}
    assert fold(module) is None
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_random_state_and_modes_stay():
    module = StandardisedConv(5, 7, 3).train()
    state = torch.get_rng_state()
    assert fold(module).layer.training
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lazy_subclass_is_not_folded():
    class Lazy(nn.LazyLinear):
        pass

    assert fold(Lazy(6)) is None
