"""Layers that a model holds beside their names."""

from __future__ import annotations

import copy
import functools
from collections import deque, namedtuple

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.graph.placing import put
from tests.support.compression import assert_same_outputs, decisions, quick

X = torch.linspace(-1, 1, 128, dtype=torch.float64).reshape(2, 64)


class Head(nn.Module):
    """As Mask2Former's: the forward goes over a plain list of layers that are registered as well."""

    def __init__(self):
        super().__init__()
        self.steps = [nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)]
        for i, step in enumerate(self.steps):
            self.add_module(str(i), step)
        self.last = nn.Linear(32, 8)
        self.by_name = {"last": (self.last, "a word")}

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.by_name["last"][0](x)


class Untraceable(Head):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def make(cls):
    torch.manual_seed(0)
    return cls().double().eval()


@pytest.mark.parametrize("cls", [Head, Untraceable])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_in_a_list_is_replaced_there_too(cls, inplace, tmp_path):
    result = quick(make(cls), X, ratio=2.0, inplace=inplace)
    assert set(decisions(result).values()) == {"svd"}
    if inplace or cls is Untraceable:
        assert [step is getattr(result.model, str(i)) for i, step in enumerate(result.model.steps)] == [True] * 3
        assert result.model.by_name["last"] == (result.model.last, "a word")
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, cls().double().eval())
    assert type(loaded) is cls
    assert torch.equal(loaded(X), result.model(X))
    assert not torch.allclose(loaded(X), make(cls)(X))


def test_what_is_put_is_taken_back():
    model = make(Head)
    twin, layers = copy.deepcopy(model), {"0": model.steps[0], "last": model.last}
    put(model, {"0": nn.Identity(), "last": nn.Flatten()})
    assert (type(model.steps[0]), type(model.by_name["last"][0])) == (nn.Identity, nn.Flatten)
    put(model, layers)
    assert (model.steps[0], model.by_name["last"][0]) == (layers["0"], layers["last"])
    assert_same_outputs(model, twin, X)


def test_modules_are_found_in_partials_named_tuples_deques_and_sets():
    pair = namedtuple("pair", "a b")
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    model.step = functools.partial(max, model[0], key=model[1])
    model.pair, model.queue, model.group = pair(model[0], 1), deque([model[0]]), {model[0]}
    new = nn.Identity()
    put(model, {"0": new})
    assert model.step.args == (new,)
    assert model.step.keywords == {"key": model[1]}
    assert model.pair == pair(new, 1)
    assert [*model.queue] == [new]
    assert model.group == {new}
