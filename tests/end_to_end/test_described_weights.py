"""compress() of models that ask a layer's weight for its dtype, device or shape: that is not reading the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.errors import FxlrdError
from fxlrd.layers.readable import ReadableFactors
from tests.support.clothes import TransposedLinear
from tests.support.compression import FULL_RANK, assert_same_outputs, decisions, largest_error, quick

ASKS = {
    "dtype": lambda fc, x: x.to(fc.weight.dtype),
    "device": lambda fc, x: x.to(fc.weight.device),
    "to": lambda fc, x: x.to(fc.weight),
    "type_as": lambda fc, x: x.type_as(fc.weight),
    "shape": lambda fc, x: x.reshape(-1, fc.weight.shape[1]),
    "shapes": lambda fc, x: x.reshape(*x.shape[:-1], *fc.weight.shape[1:]),
    "size": lambda fc, x: x * fc.weight.size(0) / fc.weight.size()[0],
    "ndim": lambda fc, x: x * fc.weight.ndim + fc.weight.dim() - 2,
    "numel": lambda fc, x: x + fc.weight.numel(),
    "is_cuda": lambda fc, x: x * 2 if fc.weight.is_cuda else x,
    "new_zeros": lambda fc, x: x + fc.weight.new_zeros(x.shape[-1]),
    "bias": lambda fc, x: x.to(fc.bias.dtype),
    "no bias": lambda fc, x: x if fc.bias is not None else x * 2,
    "as T5": lambda fc, x: x.to(fc.weight.dtype) if isinstance(fc.weight, torch.Tensor) else x * 2,
}


class Model(nn.Module):
    def __init__(self, ask, branches, layer=None):
        super().__init__()
        self.a, self.fc = nn.Linear(8, 8), layer or nn.Linear(8, 8)
        self.ask, self.branches = ask, branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        return self.fc(ASKS[self.ask](self.fc, self.a(x).tanh()))


X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)
each_capture = pytest.mark.parametrize("branches", [False, True], ids=["whole", "regions"])


def model_of(ask, branches, layer=None):
    torch.manual_seed(0)
    return Model(ask, branches, layer).double().eval()


@each_capture
@pytest.mark.parametrize("ask", ASKS)
def test_the_layer_is_decomposed(ask, branches):
    model = model_of(ask, branches)
    result = quick(model, X, pipeline=FULL_RANK)
    assert decisions(result) == {"a": "svd", "fc": "svd"}
    assert_same_outputs(result.model, model, torch.randn(3, 8, dtype=torch.float64))


@each_capture
@pytest.mark.parametrize("ask", ["dtype", "to", "shape"])
def test_the_result_is_converted_copied_trained_and_saved(ask, branches, tmp_path):
    result = quick(model_of(ask, branches), X, ratio=1.5)
    halved = copy.deepcopy(result.model).bfloat16()
    assert halved(X.bfloat16()).dtype == torch.bfloat16
    assert largest_error(halved(X.bfloat16()).double(), result.model(X)) < 0.05
    result.model.train()(X).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, model_of(ask, branches))
    with torch.no_grad():
        assert torch.equal(loaded(X), result.model(X))
    assert loaded.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    again = quick(loaded.double(), X, ratio=1.5)
    assert set(decisions(again).values()) == {"skipped"}


@each_capture
def test_in_place(branches):
    model = model_of("dtype", branches)
    original = copy.deepcopy(model)
    assert quick(model, X, pipeline=FULL_RANK, inplace=True).model is model
    assert model.fc.weight.shape == (8, 8)
    assert_same_outputs(model, original, X)


def test_only_a_layer_that_is_asked_has_a_description():
    compressed = quick(model_of("dtype", True), X, ratio=1.5).model
    assert type(compressed.a) is ReadableFactors
    weight = compressed.fc.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (torch.float64, torch.device("cpu"), (8, 8))
    assert "Description" in repr(weight)
    assert set(compressed.state_dict()) == {
        f"{n}.{p}" for n in ("a", "fc") for p in ("first.weight", "last.weight", "last.bias")
    }


@pytest.mark.parametrize(
    "use", [lambda w: w + 1, lambda w: X @ w.T, lambda w: w[0], lambda w: nn.functional.linear(X, w)]
)
def test_what_would_need_its_values_says_so(use):
    weight = quick(model_of("dtype", True), X, ratio=1.5).model.fc.weight
    with pytest.raises(FxlrdError, match="the layer is decomposed: it has factors and no weight of its own"):
        use(weight)


@pytest.mark.parametrize("ask", ["dtype", "shape", "as T5"])
def test_the_result_is_exported(ask):
    compressed = quick(model_of(ask, True), X, ratio=1.5).model
    compressed.branches = False
    for strict in (False, True):
        exported = torch.export.export(compressed, (X,), strict=strict).module()
        assert_same_outputs(compressed, compressed, X)
        torch.testing.assert_close(exported(X), compressed(X))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("ask", ["dtype", "shape", "as T5", "no bias"])
@torch.no_grad()
def test_the_result_is_compiled_and_the_backend_gives_the_same(ask):
    model = model_of(ask, True)
    compressed = quick(model, X, ratio=1.5).model
    model.branches = compressed.branches = False
    expected = compressed(X)
    torch.testing.assert_close(torch.compile(compressed, backend="eager", fullgraph=True)(X), expected)
    backend = torch.compile(model, backend="fxlrd", options={"inner": "eager", "ratio": 1.5})
    torch.testing.assert_close(backend(X), expected)


def test_a_conv_and_a_transposed_linear_answer_as_they_are():
    model = model_of("dtype", True, TransposedLinear(8, 6))
    assert quick(model, X, pipeline="decompose{ranks=2}").model.fc.weight.shape == (8, 6)

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Conv2d(8, 12, 3)

        def forward(self, x):
            return self.projection(x.to(self.projection.weight.dtype)) if x.sum() < 1e9 else x

    patches, x = Patches().double().eval(), torch.randn(1, 8, 5, 5)
    result = quick(patches, x, pipeline="decompose{ranks=4}")
    assert decisions(result) == {"projection": "tucker2"}
    assert result.model.projection.weight.shape == (12, 8, 3, 3)
    assert result.model.float()(x).dtype == torch.float32
