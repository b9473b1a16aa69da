"""Forms of layers for trials, from one factorisation each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxlrd.allocation.choices import Curve
from fxlrd.allocation.factored import Factored
from fxlrd.layers.build import decomposed
from fxlrd.layers.fit import Fit
from fxlrd.layers.kinds import channels_per_group
from tests.allocation.test_choices import MODULES, every_rank, fit_for
from tests.support.tensors import relative_error

NAMES = ["linear", "wide linear", "grouped conv1x1", "conv", "transposed1x1"]


def layer_of(name, weighted):
    module = MODULES[name]().double()
    fit = fit_for(module, weighted)
    return SimpleNamespace(name=name, module=module, statistics=SimpleNamespace(fit=lambda _: fit)), fit


def inputs(module):
    c_in, _, groups = channels_per_group(module)
    return torch.randn(3, c_in * groups, *[5] * (module.weight.dim() - 2)).double()


@pytest.mark.parametrize("given", ["moments", "effect"])
@pytest.mark.parametrize("name", NAMES)
def test_they_are_those_that_decompose_makes(name, given):
    factored = Factored()
    for known in (False, True):
        layer, fit = layer_of(name, given == "effect")
        gram = Curve(layer.module, fit).gram
        if known and gram is not None:
            factored.grams[name] = gram
        for ranks in every_rank(layer.module)[1:4]:
            made = decomposed(layer.module, ranks, fit=fit)[0]
            x = inputs(layer.module)
            assert relative_error(factored.at(layer, ranks)(x), made(x)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_what_a_curve_was_made_of_serves_in_half_precision_at_any_scale(dtype, size):
    module = nn.Linear(64, 48).to(dtype)
    fit = Fit(size * torch.logspace(0, -5, 64).double().diag(), torch.zeros(64).double())
    layer = SimpleNamespace(name="0", module=module, statistics=SimpleNamespace(fit=lambda _: fit))
    known = Factored()
    known.know(layer, Curve(module, fit).gram)
    x = torch.logspace(0, -2.5, 64).double() * torch.randn(20, 64).double()
    forms = [each.at(layer, (24,)).double() for each in (Factored(), known)]
    assert not known.grams, "it is used up"
    assert relative_error(forms[1](x), forms[0](x)) < 4 * torch.finfo(dtype).eps


def test_no_more_is_kept_than_memory_allows(monkeypatch):
    monkeypatch.setattr("fxlrd.allocation.factored._MOST", 20)
    factored = Factored()
    for name in "abc":
        factored.know(SimpleNamespace(name=name), torch.zeros(1, 3, 3))
    assert [*factored.grams] == ["a", "b"]


@pytest.mark.parametrize("name", NAMES)
def test_where_no_output_matters_they_are_those_without_effects(name):
    layer, fit = layer_of(name, True)
    fit.importance.zero_()
    ranks, x = every_rank(layer.module)[1], inputs(layer.module)
    made = decomposed(layer.module, ranks, fit=fit._replace(importance=None))[0]
    assert relative_error(Factored().at(layer, ranks)(x), made(x)) < 1e-9
