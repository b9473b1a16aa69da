from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.capturing.dynamo import raise_graph, weights_of
from fxlrd.capturing.dynamo_encoder import FUNCTION, with_encoder_layers
from fxlrd.graph.surgery import layers
from fxlrd.layers.attention import PROJECTIONS
from tests.support.attention import CAUSAL, PADDING, values
from tests.support.backend import compiled
from tests.support.dynamo import graph

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = values(2, 5, 16)
MASKS = {"none": {}, "mask": {"src_mask": CAUSAL}, "padding": {"src_key_padding_mask": PADDING}}
MASKS["both"] = MASKS["mask"] | MASKS["padding"]


class Model(nn.Module):
    def __init__(self, masks=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.masks = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options), masks or {}
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.double().eval()

    def forward(self, x):
        return self.layer(x, **self.masks)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
@torch.no_grad()
def test_the_functions_compute_what_the_one_does_that_runs_in_eval_mode(masks, options):
    model = Model(MASKS[masks], **options)
    gm, given = graph(model, X)
    assert list(gm.graph.find_nodes(op="call_function", target=FUNCTION))
    expanded = with_encoder_layers(gm)
    assert not list(expanded.graph.find_nodes(op="call_function", target=FUNCTION))
    torch.testing.assert_close(expanded(*given)[0], model(X), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_all_six_layers_are_reached():
    model = Model(MASKS["both"])
    gm, given = graph(model, X)
    names = [*(f"layer.self_attn.{role}" for role in PROJECTIONS), "layer.linear1", "layer.linear2"]
    assert list(layers(raise_graph(gm, weights_of(gm, given)).graph_module)) == names
    for passes in ("decompose{ranks=100}", "decompose{ranks=100,skip=*self_attn}"):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model, passes=passes)(X), model(X), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_graph_without_encoder_layers_stays_as_it_is():
    gm, _ = graph(nn.Sequential(nn.Linear(16, 4)).double(), X)
    assert with_encoder_layers(gm) is gm
