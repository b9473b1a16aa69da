"""compress() of models whose layers are subclasses, or classes of their own, that compute what a stock layer does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxlrd
from tests.support.clothes import CLOTHES, TransposedLinear, WrittenOut
from tests.support.compression import FULL_RANK, assert_same_outputs, decisions, layer_reasons, quick


class Model(nn.Module):
    """Two layers of one class; ``branches`` on values, so that it is not traceable as a whole."""

    def __init__(self, cls, branches):
        super().__init__()
        self.a, self.b, self.branches = cls(16, 24), cls(24, 16), branches
        self.embedding = None

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        y = self.a(x).relu()
        if self.embedding is not None:
            y = y + self.embedding(x[..., 0].long().abs())
        return self.b(y)


def model_of(cls, branches):
    torch.manual_seed(0)
    return Model(cls, branches).double().eval()


X = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(2, 5, 16).sin()
pytestmark = [pytest.mark.parametrize("branches", [False, True], ids=["whole", "regions"])]


@pytest.mark.parametrize("cls", CLOTHES)
def test_such_a_layer_is_decomposed(cls, branches):
    model = model_of(cls, branches)
    result = quick(model, X, pipeline=FULL_RANK)
    assert decisions(result) == {"a": "svd", "b": "svd"}
    assert [row["op"] for row in result.report.layers] == ["Linear", "Linear"]
    assert [row["shape"] for row in result.report.layers] == [[24, 16], [16, 24]]
    assert result.report.before["params"] == sum(p.numel() for p in model.parameters())
    assert_same_outputs(result.model, model, torch.randn(3, 16, dtype=torch.float64))


@pytest.mark.parametrize("cls", CLOTHES)
def test_one_that_is_left_alone_stays_what_it_was(cls, branches):
    model = model_of(cls, branches)
    result = quick(model, X, pipeline=FULL_RANK, skip="a")
    assert decisions(result) == {"a": "skipped", "b": "svd"}
    assert type(result.model.a) is cls
    assert result.model.a is not model.a
    assert result.model.state_dict().keys() >= {f"a.{name}" for name in model.a.state_dict()}
    assert_same_outputs(result.model, model, X)
    assert type(model.a) is type(model.b) is cls


@pytest.mark.parametrize("cls", CLOTHES)
def test_in_place(cls, branches):
    model = model_of(cls, branches)
    original = copy.deepcopy(model)
    assert quick(model, X, pipeline=FULL_RANK, skip="a", inplace=True).model is model
    assert type(model.a) is cls
    assert isinstance(model.b, nn.Sequential)
    assert_same_outputs(model, original, X)


@pytest.mark.parametrize("cls", [TransposedLinear, WrittenOut])
def test_saved_and_loaded(cls, branches, tmp_path):
    model = model_of(cls, branches)
    result = quick(model, X, ratio=2.0, skip="a")
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, Model(cls, branches).double())
    with torch.no_grad():
        assert torch.equal(loaded(X), result.model(X))


def test_it_may_be_compressed_again(branches):
    model = model_of(TransposedLinear, branches)
    once = quick(model, X, pipeline=FULL_RANK, skip="a").model
    twice = quick(once, X, pipeline=FULL_RANK)
    assert decisions(twice)["a"] == "svd"
    assert_same_outputs(twice.model, model, X)


def test_a_weight_that_another_layer_holds_too_is_left_alone(branches):
    model = model_of(TransposedLinear, branches)
    model.embedding = nn.Embedding(16, 24).double()
    model.embedding.weight = model.a.weight
    result = quick(model, X, pipeline=FULL_RANK)
    assert decisions(result) == {"a": "skipped", "b": "svd"}
    assert "shared" in layer_reasons(result)["a"]
    assert result.model.embedding.weight is result.model.a.weight


def test_one_with_a_hook_is_left_alone(branches):
    model = model_of(TransposedLinear, branches)
    model.a.register_forward_hook(lambda module, args, output: output * 2)
    result = quick(model, X, pipeline=FULL_RANK)
    assert decisions(result) == {"a": "skipped", "b": "svd"}
    assert "hooks" in layer_reasons(result)["a"]
    assert_same_outputs(result.model, model, X)
