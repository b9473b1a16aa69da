"""Forms of layers for trials, from one factorisation each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fxlrd.allocation.choices import Curve
from fxlrd.allocation.factored import Factored
from fxlrd.layers.build import decomposed
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


@pytest.mark.parametrize("name", NAMES)
def test_where_no_output_matters_they_are_those_without_effects(name):
    layer, fit = layer_of(name, True)
    fit.importance.zero_()
    ranks, x = every_rank(layer.module)[1], inputs(layer.module)
    made = decomposed(layer.module, ranks, fit=fit._replace(importance=None))[0]
    assert relative_error(Factored().at(layer, ranks)(x), made(x)) < 1e-9
