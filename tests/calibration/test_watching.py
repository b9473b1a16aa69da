"""Runs of a model that are watched: who reads and makes what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.capturing.regions import capture_regions
from fxlrd.graph.facts import statistics
from fxlrd.graph.surgery import calls, layers
from fxlrd.passes import Calibrate


class Block(nn.Module):
    """Two layers read one tensor, inside a forward that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        if float(x.detach().sum()) > 1e9:
            return x
        return self.out(self.query(x) * self.key(x).tanh())


class Blocks(nn.Module):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).double()


def test_a_model_that_keeps_its_forward_runs_once_for_moments_and_effects():
    gm, runs = capture_regions(Blocks().double().eval(), X[:3]), []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: runs.append(len(args[0])) if type(module).__name__ == "Blocks" else None
    )
    try:
        after = Calibrate(list(X.split(16)), outputs=False, effects=99)(gm).graph_module
    finally:
        handle.remove()
    assert runs.count(16) == 4
    measured = {name: statistics(calls(after, name)[0]) for name in layers(after)}
    assert all(each.importance is not None for each in measured.values())
    assert measured["blocks.0.query"].input_moments is measured["blocks.0.key"].input_moments
    torch.testing.assert_close(measured["blocks.0.query"].input_moments.products, X.mT @ X, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("effects", [0, 99])
def test_a_forward_in_inference_mode_is_measured(effects):
    model = type("Inferring", (Blocks,), {"forward": torch.inference_mode()(Blocks.forward)})().double().eval()
    after = Calibrate(X, effects=effects)(capture_regions(model, X[:3])).graph_module
    moments = statistics(calls(after, "blocks.0.query")[0]).input_moments
    torch.testing.assert_close(moments.products, X.mT @ X, rtol=1e-12, atol=1e-12)
