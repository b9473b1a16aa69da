"""Factors whose layer's weight other code reads, and scales by rows."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.layers.build import decomposed
from fxlrd.layers.readable import ReadableFactors, row_scale, weight_shape_of
from tests.support.clothes import TransposedLinear

LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (3,), (5, 8)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (4, 5), (2, 8, 7, 7)),
    "one mode": (lambda: nn.Conv3d(4, 8, 3), (None, 4), (1, 4, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(16, 32, 1, groups=4, bias=False), (3,), (1, 16, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2, stride=2), (2, 3), (1, 8, 4, 4)),
    "transposed 1×1": (lambda: nn.ConvTranspose1d(8, 6, 1), (3,), (2, 8, 5)),
}


def readable(name):
    """Return a layer, its factors, and an input."""
    make, ranks, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    factors = ReadableFactors(OrderedDict(decomposed(layer, ranks)[0].named_children()))
    factors.weight_shape, factors.groups = weight_shape_of(layer), getattr(layer, "groups", 1)
    return layer, factors, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_the_composed_weight_computes_what_the_factors_do(name):
    layer, factors, x = readable(name)
    assert factors.weight.shape == layer.weight.shape
    layer.weight, layer.bias = nn.Parameter(factors.weight.clone()), factors.bias
    torch.testing.assert_close(layer(x), factors(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_scaled_by_rows_scales_the_last_factor(name):
    _, factors, x = readable(name)
    axis = 1 if isinstance(factors[-1], nn.ConvTranspose2d) or "transposed" in name else 0
    rows = 12 if name in ("linear", "conv", "transposed") else factors(x).shape[1]
    scale = torch.linspace(-2, 3, rows, dtype=torch.float64)
    before = factors(x) - (0 if factors.bias is None else factors.bias.view(-1, *[1] * (x.dim() - 2)))
    weight = factors.weight
    if axis:  # (C, S/G, k…): the rows of a group are the second axis
        groups = factors.groups
        by_row = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
        factors.weight = nn.Parameter(weight * by_row.view(*weight.shape[:2], *[1] * (weight.dim() - 2)))
    else:
        factors.weight = nn.Parameter(weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    factors.bias = nn.Parameter(torch.zeros(rows, dtype=torch.float64))
    channels = scale if name == "linear" else scale.view(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(factors(x), before * channels)


def test_a_batch_norm_is_folded_by_torch():
    _, factors, x = readable("conv")
    norm = nn.BatchNorm2d(12).double().eval()
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            tensor.normal_()
    fused = nn.utils.fuse_conv_bn_eval(factors.eval(), norm)
    assert isinstance(fused, ReadableFactors)
    torch.testing.assert_close(fused(x), norm(factors(x)))
    single = nn.utils.fuse_conv_bn_eval(copy.deepcopy(factors).float(), copy.deepcopy(norm).float())
    torch.testing.assert_close(single(x.float()), norm(factors(x)).float(), atol=2e-6, rtol=1e-5)


WRITES = {
    "data": lambda f: f.weight.data.add_(1),
    "in place": lambda f: f.weight.mul_(2),
    "a view": lambda f: f.weight.detach().view(-1)[:3].zero_(),
    "an entry": lambda f: f.weight.__setitem__(0, 1),
    "another's data": lambda f: setattr(f.weight, "data", torch.ones(1)),
    "initialisation": lambda f: nn.init.normal_(f.weight),
    "a list": lambda f: torch._foreach_add_([f.weight], 1),
    "out": lambda f: torch.mul(f.weight, 2, out=f.weight),
    "gradient": lambda f: f.weight.requires_grad_(),
    "other weight": lambda f: setattr(f, "weight", nn.Parameter(f.weight + torch.randn(12, 8))),
    "other dtype": lambda f: setattr(f, "weight", nn.Parameter(f.weight.float())),
    "no weight": lambda f: setattr(f, "weight", None),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_a_write_raises_and_changes_nothing(write):
    _, factors, x = readable("linear")
    before = factors(x)
    with pytest.raises(FxlrdError, match=r"decomposed layer .*first, and then fxlrd\.compress$"):
        write(factors)
    assert torch.equal(factors(x), before)


def test_gradients_of_a_composed_weight_reach_the_factors():
    _, factors, _ = readable("conv")
    factors.weight.square().sum().backward()
    assert all(part.weight.grad is not None for part in factors)
    assert not factors.weight.detach().numpy().flags.writeable


def test_a_layer_with_another_weight_has_none_to_read():
    factors = ReadableFactors(nn.Linear(8, 2, bias=False), nn.Linear(2, 6))
    factors.weight_shape = weight_shape_of(TransposedLinear(8, 6))
    assert not hasattr(factors, "weight")
    assert not hasattr(factors, "bias")
    with pytest.raises(AttributeError, match=r"has no weight but its factors 0, 1: .* first, and then fxlrd\.compress"):
        _ = factors.weight


def test_copies_are_readable_and_pickles_need_no_fxlrd():
    _, factors, x = readable("conv")
    for other in (copy.deepcopy(factors), copy.copy(factors)):
        assert torch.equal(other.weight, factors.weight)
    stored = pickle.dumps(factors)
    assert b"fxlrd" not in stored
    other = pickle.loads(stored)
    assert type(other) is nn.Sequential
    assert torch.equal(other(x), factors(x))


def test_rows_are_scaled_up_to_rounding_only():
    weight = torch.randn(4, 100)
    scale = torch.tensor([1e-3, -2.0, 0.0, 7e5])
    found = row_scale(weight * scale[:, None], weight)
    assert found is not None
    torch.testing.assert_close(found, scale.double(), rtol=1e-6, atol=0)
    assert row_scale(weight * scale[:, None] + 1e-4, weight) is None
    assert row_scale(weight, torch.zeros_like(weight)) is None


@pytest.mark.filterwarnings("ignore")
def test_factors_are_scripted_traced_exported_and_compiled():
    _, factors, x = readable("conv")
    model = nn.Sequential(factors)
    exported = torch.export.export(model, (x,)).module()
    for other in (torch.jit.script(model), torch.jit.trace(model, x), exported, torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(other(x), model(x))
