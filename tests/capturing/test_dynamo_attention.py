from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxlrd.capturing.dynamo import has_layers, raise_graph, weights_of
from fxlrd.capturing.lowering import lower_graph
from fxlrd.graph.surgery import layers
from fxlrd.layers.attention import PROJECTIONS
from fxlrd.passes import Decompose
from fxlrd.pipeline import Pipeline
from tests.support.attention import CROSS, MASKS, Block, Cross, X, attention, values
from tests.support.backend import compiled
from tests.support.dynamo import graph

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
QKVO = [f"attn.{role}" for role in PROJECTIONS]


def lowered(model, *inputs, freezing=False, **options):
    """Return the lowered graph, and what it gives."""
    gm, given = graph(model, *inputs, freezing=freezing)
    found = raise_graph(gm, weights_of(gm, given))
    done = Pipeline([Decompose(**options)])(found.graph_module)
    new = lower_graph(done.graph_module, found, gm, freezing)
    placed = [] if freezing else list(new.factors.values())
    return new, new.graph_module(*given, *placed)


def called(new):
    return [node.target for node in new.graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_projections_are_layers_of_the_raised_graph_and_functions_of_the_lowered_one(masks, freezing):
    model, inputs = Block().eval(), (X, *MASKS[masks])
    gm, given = graph(model, *inputs, freezing=freezing)
    assert has_layers(gm, weights_of(gm, given))
    found = raise_graph(gm, weights_of(gm, given))
    assert list(layers(found.graph_module)) == [*QKVO, "mlp.0", "mlp.2"]
    new, outputs = lowered(model, *inputs, freezing=freezing, ranks=8)
    torch.testing.assert_close(outputs[0], model(*inputs), rtol=1e-10, atol=1e-10)
    assert F.multi_head_attention_forward not in called(new)
    assert called(new).count(F.scaled_dot_product_attention) == 1
    assert len(new.sources) == 4 + 4


@torch.no_grad()
def test_an_attention_of_which_nothing_was_replaced_is_the_function_that_it_was():
    model = Block().eval()
    new, outputs = lowered(model, X, ranks=8, skip="attn")
    torch.testing.assert_close(outputs[0], model(X), rtol=1e-10, atol=1e-10)
    assert called(new).count(F.multi_head_attention_forward) == 1
    assert F.scaled_dot_product_attention not in called(new)
    assert all("mlp" in name for name in new.sources)


@torch.no_grad()
def test_what_is_left_of_a_packed_weight_is_a_view_of_it_and_no_factor():
    model = Block().eval()
    new, outputs = lowered(model, X, ranks={"attn.q_proj": 8})
    torch.testing.assert_close(outputs[0], model(X), rtol=1e-10, atol=1e-10)
    assert sorted(new.factors) == [f"fxlrd_attn_q_proj_{name}" for name in ("first_weight", "last_bias", "last_weight")]
    assert {name.rpartition("attn_parameters_")[2].strip("_") for name in new.sources} == {
        "in_proj_weight",
        "in_proj_bias",
    }


@torch.no_grad()
def test_an_attention_that_is_called_twice_with_other_widths_and_weights():
    model = Cross().eval()
    gm, given = graph(model, *CROSS)
    assert list(layers(raise_graph(gm, weights_of(gm, given)).graph_module)) == ["fc", *QKVO]
    new, outputs = lowered(model, *CROSS, ranks=8)
    for output, expected in zip(outputs, model(*CROSS), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert len(new.factors) == 5 * 3


@torch.no_grad()
def test_weights_that_nobody_reads_are_not_computed():
    class Discarding(Block):
        def forward(self, x):
            return self.mlp(self.attn(x, x, x)[0])

    model = Discarding().eval()
    new, outputs = lowered(model, X, ranks=8)
    torch.testing.assert_close(outputs[0], model(X), rtol=1e-10, atol=1e-10)
    assert F.softmax not in called(new)
    assert called(new).count(F.scaled_dot_product_attention) == 1


@torch.no_grad()
def test_keys_of_its_own_are_left_alone():
    class Model(Block):
        def __init__(self):
            super().__init__()
            self.attn = attention(batch_first=True, add_bias_kv=True)

    gm, given = graph(Model().eval(), X)
    assert list(layers(raise_graph(gm, weights_of(gm, given)).graph_module)) == ["mlp.0", "mlp.2"]


@torch.no_grad()
def test_a_compiled_model_follows_its_weights_and_the_sizes_of_its_inputs():
    model = Block().eval()
    compressed = compiled(model, passes="decompose{ranks=8}")
    torch.testing.assert_close(compressed(X), model(X), rtol=1e-10, atol=1e-10)
    model.attn.in_proj_weight.mul_(1.5)
    torch.testing.assert_close(compressed(X), model(X), rtol=1e-10, atol=1e-10)
    longer = values(3, 9, 8)
    torch.testing.assert_close(compressed(longer), model(longer), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_under_inductor(freezing):
    model = Block().eval()
    with torch._inductor.config.patch(freezing=freezing):
        compressed = compiled(model, passes="decompose{ranks=8}", inner="inductor")
        torch.testing.assert_close(compressed(X, *MASKS["both"]), model(X, *MASKS["both"]), rtol=1e-9, atol=1e-9)
