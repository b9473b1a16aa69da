"""compress() of torch's own transformers: the layers inside are reached, and no fast path reads what was replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.errors import VerificationError
from fxlrd.layers.attention import PROJECTIONS
from tests.support.compression import FULL_RANK, assert_same_outputs, decisions, quick


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers).double().eval()


X = torch.linspace(-3, 3, 2 * 5 * 16, dtype=torch.float64).sin().reshape(2, 5, 16)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def test_the_linears_of_encoder_layers_are_decomposed():
    model = encoder()
    result = quick(model, X, pipeline=FULL_RANK)
    assert decisions(result) == {
        f"layers.{i}.{name}": "svd"
        for i in range(2)
        for name in ("linear1", "linear2", *(f"self_attn.{role}" for role in PROJECTIONS))
    }
    assert isinstance(result.model.layers[0].linear1, nn.Sequential)
    assert_same_outputs(result.model, model, X)
    assert_same_outputs(result.model, model, torch.randn(3, 7, 16, dtype=torch.float64))


@pytest.mark.parametrize("skip", [(), "layers.0", "*.linear1", "layers.1"])
@pytest.mark.parametrize("grad", [False, True])
def test_no_fast_path_runs_where_layers_were_replaced(skip, grad):
    model = encoder()
    compressed = quick(model, X, pipeline=FULL_RANK, skip=skip)
    assert any("padded positions are no longer zeros" in warning for warning in compressed.report.warnings)
    result, kept = compressed.model, ~PADDING
    with torch.set_grad_enabled(grad):
        outputs = result(X, src_key_padding_mask=PADDING)
        expected = model(X, src_key_padding_mask=PADDING)
    assert outputs.shape == expected.shape
    torch.testing.assert_close(outputs[kept], expected[kept], rtol=1e-9, atol=1e-9)


def test_fast_paths_stay_on_elsewhere():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = encoder(1), encoder(1)

        def forward(self, x):
            return self.b(self.a(x))

    result = quick(Two(), X, ratio=1.5, skip="b").model
    assert (result.a.use_nested_tensor, result.b.use_nested_tensor) == (False, True)
    assert [e.layers[0].activation_relu_or_gelu for e in (result.a, result.b)] == [0, 1]


class Refusing(nn.Module):
    """Fails once its encoder is decomposed."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder(1)

    def forward(self, x):
        if hasattr(self.encoder.layers[0].linear1, "last") and self.encoder.layers[0].linear1.last.out_features == 32:
            raise KeyError("linear1")
        return self.encoder(x)


def test_a_model_that_is_put_back_has_its_fast_paths_again():
    model = Refusing()
    with pytest.raises(VerificationError):
        quick(model, X, pipeline=FULL_RANK, inplace=True)
    assert model.encoder.use_nested_tensor
    assert model.encoder.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_a_whole_transformer(inplace):
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).double().eval()
    original = copy.deepcopy(model)
    result = quick(model, (X, X[:, :3]), pipeline=FULL_RANK, inplace=inplace)
    cut = {name for name, decision in decisions(result).items() if decision == "svd"}
    attentions = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    projections = {f"{attention}.{role}" for attention in attentions for role in PROJECTIONS}
    assert cut == projections | {f"{side}.layers.0.linear{i}" for side in ("encoder", "decoder") for i in (1, 2)}
    assert_same_outputs(result.model, original, X, X[:, :3])
    assert_same_outputs(result.model, original, X[:1], X[:1, :4])
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    assert_same_outputs(result.model, original, X, X[:, :4], tgt_mask=causal)


def test_an_encoder_inside_a_model_that_could_be_traced_without_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), encoder(1), nn.Linear(16, 4)).double().eval()
    result = quick(model, X, pipeline=FULL_RANK)
    projections = [f"1.layers.0.self_attn.{role}" for role in PROJECTIONS]
    names = ["0", "1.layers.0.linear1", "1.layers.0.linear2", "2", *projections]
    assert decisions(result) == dict.fromkeys(names, "svd")
    assert_same_outputs(result.model, model, X)


def test_layers_are_refitted_beside_an_attention_that_stays_as_it_was():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 5, 16, generator=generator, dtype=torch.float64) for _ in range(12)]
    options = {"calibration": inputs, "skip": "layers.0.self_attn.*"}
    fitted = "calibrate,decompose{ratio=2}"
    before, after = (
        quick(encoder(), X, pipeline=steps, **options).model.layers
        for steps in (fitted, f"{fitted},refit{{guard=false}}")
    )
    assert type(after[0].self_attn) is nn.MultiheadAttention
    for layer in (0, 1):
        assert not torch.equal(before[layer].linear2[-1].weight, after[layer].linear2[-1].weight)
    assert not torch.equal(before[1].self_attn.q_proj[-1].weight, after[1].self_attn.q_proj[-1].weight)


def test_trained_saved_and_loaded(tmp_path):
    result = quick(encoder(dropout=0.0), X, ratio=1.5)
    result.model.train()(X).sum().backward()
    assert result.model.layers[0].linear1.first.weight.grad.abs().sum() > 0
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, encoder(dropout=0.0)).eval()
    result.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), result.model(X))
        assert torch.equal(loaded(X, src_key_padding_mask=PADDING), result.model(X, src_key_padding_mask=PADDING))
