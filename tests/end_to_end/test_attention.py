"""compress() of models with nn.MultiheadAttention: its projections are layers like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxlrd
from fxlrd.capturing.model import capture_any
from fxlrd.graph.captured import captured
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.attention import PROJECTIONS, ProjectedAttention
from tests.support.attention import CAUSAL, CROSS, MASKS, Block, Branching, Cross, X, attention, values
from tests.support.compression import FULL_RANK, assert_same_outputs, decisions, layer_reasons, quick

QKVO = [f"attn.{role}" for role in PROJECTIONS]


def trained(model, *args, seed=0):
    """Return what a model in training mode gives, and the gradients of its parameters."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    output = model(*args)
    output.sin().sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", [Block, Branching])
def test_all_four_projections_are_decomposed_whatever_the_masks(kind, masks):
    model, inputs = kind().eval(), (X, *MASKS[masks])
    result = quick(model, inputs, pipeline=FULL_RANK)
    assert decisions(result) == dict.fromkeys((*QKVO, "mlp.0", "mlp.2"), "svd")
    assert isinstance(result.model, fx.GraphModule) == (kind is Block)
    assert_same_outputs(result.model, model, *inputs)
    assert_same_outputs(result.model, model, values(2, 5, 8, seed=9), *MASKS[masks])
    if masks == "none":
        assert_same_outputs(result.model, model, values(3, 7, 8, seed=9))


def test_where_the_model_keeps_its_forward_other_masks_are_taken_too():
    model = Branching().eval()
    result = quick(model, X, pipeline=FULL_RANK).model
    assert type(result.attn) is ProjectedAttention
    for masks in MASKS.values():
        assert_same_outputs(result, model, X, *masks)
    unpickled = pickle.loads(pickle.dumps(result))
    assert_same_outputs(unpickled, model, X, CAUSAL)


@pytest.mark.parametrize("masks", [(CAUSAL.double(),), (CAUSAL.expand(4, 5, 5),)])
def test_a_graph_refuses_masks_of_another_form_than_in_the_example(masks):
    result = quick(Block().eval(), (X, CAUSAL), pipeline=FULL_RANK).model
    with pytest.raises(AssertionError, match="than in the example"):
        result(X, *masks)


class Discarding(Block):
    """Asks for the attention weights, as is the default, and does not read them."""

    def forward(self, x):
        h = self.norm(x)
        return self.mlp(self.attn(h, h, h)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_attention_weights_that_nobody_reads_are_not_computed(dropout):
    model = Discarding(dropout=dropout).eval()
    result = quick(model, X, pipeline=FULL_RANK, skip=["mlp", *QKVO[:3]]).model
    targets = {node.target for node in result.graph.nodes}
    assert F.scaled_dot_product_attention in targets
    assert F.softmax not in targets
    assert_same_outputs(result, model, X)
    torch.testing.assert_close(trained(result, X)[0], trained(model, X)[0], rtol=1e-9, atol=1e-9)
    assert type(quick(model, X, ratio=1.5, skip="attn").model.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("inplace", [False, True])
def test_cross_attention_with_weights_called_twice(inplace):
    model, inputs = Cross().eval(), CROSS
    original = copy.deepcopy(model)
    result = quick(model, inputs, pipeline=FULL_RANK, inplace=inplace)
    assert decisions(result) == dict.fromkeys(("fc", *QKVO), "svd")
    assert_same_outputs(result.model, original, *inputs)
    assert_same_outputs(result.model, original, values(3, 4, 8), values(2, 4, 6, seed=1), values(2, 4, 4, seed=2))


@pytest.mark.parametrize("kind", [Block, Branching])
def test_counts_are_those_of_torch_and_a_tenth_of_the_width_is_saved_in_all_four(kind):
    model = kind().eval()
    report = quick(model, X, ratio=1.6).report
    assert report.before["params"] == sum(p.numel() for p in model.parameters())
    rows = {row["name"]: row for row in report.layers}
    assert [rows[name]["params_before"] for name in QKVO] == [72] * 4
    assert [rows[name]["shape"] for name in QKVO] == [[8, 8]] * 4
    assert all(rows[name]["flops_before"] == 2 * 10 * 64 for name in QKVO)


@pytest.mark.parametrize("kind", [Block, Branching])
def test_saved_and_loaded(kind, tmp_path):
    model = kind(dropout=0.25).eval()
    result = quick(model, (X, CAUSAL), ratio=1.5, skip="attn.k_proj").model
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, kind(dropout=0.25)).eval()
    assert type(loaded) is kind
    with torch.no_grad():
        assert torch.equal(loaded(X, CAUSAL), result.eval()(X, CAUSAL))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in result.named_parameters()}
    again = quick(loaded, (X, CAUSAL), ratio=1.5, skip=["attn.q_proj", "attn.v_proj", "attn.out_proj", "mlp"])
    assert decisions(again)["attn.k_proj"] == "svd"
    fxlrd.save(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(fxlrd.load(tmp_path, kind(dropout=0.25)).eval()(X, CAUSAL), again.model.eval()(X, CAUSAL))


@pytest.mark.parametrize("kind", [Block, Branching])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_it_trains_as_before(kind, dropout):
    model = kind(dropout=dropout).eval()
    result = quick(model, X, pipeline=FULL_RANK, skip=["mlp", "attn.q_proj", "attn.k_proj", "attn.v_proj"]).model
    output, gradients = trained(result, X)
    expected, wanted = trained(model, X)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    packed = torch.cat([gradients[f"attn.{role}.weight"] for role in PROJECTIONS[:3]])
    torch.testing.assert_close(packed, wanted["attn.in_proj_weight"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients["mlp.0.weight"], wanted["mlp.0.weight"], rtol=1e-9, atol=1e-9)
    if dropout:
        result.attn.eval()
        assert not torch.allclose(trained_part(result), output)


def trained_part(model):
    """Return the output where all but the attention is in training mode."""
    torch.manual_seed(0)
    return model(X).detach()


@pytest.mark.parametrize("kind", [Block, Branching])
@pytest.mark.parametrize("masks", ["none", "both"])
def test_an_attention_that_nothing_is_done_to_comes_back_as_it_was(kind, masks):
    model, inputs = kind(dropout=0.25).eval(), (X, *MASKS[masks])
    result = quick(model, inputs, ratio=1.5, skip="attn").model
    assert type(result.attn) is nn.MultiheadAttention
    assert torch.equal(result.attn.in_proj_weight, model.attn.in_proj_weight)
    assert result.attn.in_proj_weight is not model.attn.in_proj_weight
    nothing = quick(model, inputs, skip="*").model
    assert list(nothing.state_dict()) == list(model.state_dict())
    assert_same_outputs(nothing, model, *inputs)


def test_changed_in_place_and_put_back():
    class Refusing(Branching):
        def forward(self, x):
            if hasattr(getattr(self.attn, "q_proj", None), "last"):
                raise KeyError("q_proj")
            return super().forward(x)

    model = Refusing().eval()
    attn, names = model.attn, list(model.state_dict())
    with pytest.raises(fxlrd.FxlrdError):
        quick(model, X, pipeline=FULL_RANK, inplace=True)
    assert model.attn is attn
    assert list(model.state_dict()) == names
    assert not hasattr(attn, "q_proj")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m.attn.register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: setattr(m, "attn", attention(batch_first=True, add_bias_kv=True)), "added-keys"),
        (lambda m: setattr(m, "attn", attention(batch_first=True, add_zero_attn=True)), "added-keys"),
        (lambda m: setattr(m.mlp[2], "weight", m.attn.in_proj_weight), "shared-parameter"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.attn, "in_proj_weight"), "parametrized"),
    ],
)
def test_an_attention_that_would_lose_something_is_left_alone_with_the_reason(change, code):
    model = Branching().eval()
    model.mlp[2] = nn.Linear(16, 8).double() if code != "shared-parameter" else Widened()
    change(model)
    entries = captured(capture_any(model, Inputs.of(X))).unreached
    assert {entry.reason.code for name, entry in entries.items() if "in_proj_weight" in name} == {code}


class Widened(nn.Module):
    """A linear layer whose weight may be that of three projections."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 8, dtype=torch.float64))

    def forward(self, x):
        return (x[..., :8] @ self.weight.mT)[..., :8]


def test_an_attention_whose_type_or_weight_the_model_asks_for_is_left_alone():
    class Asking(Branching):
        def forward(self, x):
            return super().forward(x) * self.attn.in_proj_weight.mean()

    model = Asking().eval()
    result = quick(model, X, pipeline=FULL_RANK)
    assert decisions(result)["attn.in_proj_weight"] == "skipped"
    assert "once its projections are layers" in layer_reasons(result)["attn.in_proj_weight"]
    assert_same_outputs(result.model, model, X)


def test_one_attention_under_two_names_stays_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Block()
            self.b = Block()
            self.b.attn = self.a.attn

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() < 1e9 else x

    model = Tied().eval()
    result = quick(model, X, pipeline=FULL_RANK)
    assert result.model.a.attn is result.model.b.attn
    assert_same_outputs(result.model, model, X)


@pytest.mark.parametrize("kind", [Block, Branching])
def test_a_budget_by_effects_on_the_output(kind):
    model, batches = kind().eval(), [values(4, 5, 8, seed=i) for i in range(6)]
    result = quick(model, X, budget=fxlrd.Budget(params=0.6), calibration=batches)
    assert result.report.after["params"] <= 0.6 * result.report.before["params"]
    assert "svd" in {decision for name, decision in decisions(result).items() if name in QKVO}


def test_the_difference_names_the_projections():
    model = Block().eval()
    text = str(fxlrd.diff(fxlrd.capture(model, X), quick(model, X, pipeline="decompose{ranks=2}").model))
    assert all(name in text for name in QKVO)
