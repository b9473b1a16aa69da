from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import fxlrd
from fxlrd import Pipeline
from fxlrd.pipeline import PipelineResult
from tests.support.models import ResidualNet


@pytest.fixture(scope="session")
def net() -> nn.Module:
    """A residual network of four equal blocks; no test may change it."""
    return ResidualNet(blocks=4).eval()


@pytest.fixture(scope="session")
def graph(net: nn.Module) -> fx.GraphModule:
    """The network, captured."""
    return fxlrd.capture(net, torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="session")
def decomposed(graph: fx.GraphModule) -> PipelineResult:
    """The network, decomposed at ratio 2."""
    return Pipeline.parse("decompose{ratio=2}")(graph)


@pytest.fixture
def parts() -> dict[str, nn.Module]:
    """Modules for small graphs."""
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "bn": nn.BatchNorm1d(4), "act": nn.ReLU()}
