"""Operations that treat each channel alone, recognised by what they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlrd.graph.selection import commutes_with_selection


class Largest(nn.Module):
    """Scales by one value of the whole tensor."""

    def forward(self, x):
        return x / x.abs().amax()


class Channelwise(nn.Module):
    """Mixes positions, but no channels."""

    def forward(self, x):
        return x.cumsum(0) * torch.tanh(x.flip(0))


ALONE = {
    "activation": (lambda x: F.gelu(x, approximate="tanh"), True),
    "written out": (lambda x: x.mul(1.702).sigmoid(), True),
    "of a module": (Channelwise(), True),
    "normalised over positions": (lambda x: F.normalize(x, dim=0), True),
    "largest": (Largest(), False),
    "softmax": (lambda x: x.softmax(-1), False),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), False),
    "next channel": (lambda x: x.roll(1, -1), False),
    "sorted": (lambda x: x.sort(-1).values, False),
    "threshold": (lambda x: F.threshold(x, 20.0, 0.0), True),
    "with a state": (nn.LayerNorm(12, bias=False), False),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_commutes_with_selecting_channels(name):
    operation, expected = ALONE[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.operation = operation if isinstance(operation, nn.Module) else nn.Identity()

        def forward(self, x):
            return self.operation(x) if isinstance(operation, nn.Module) else operation(x)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m, name):
            return True

    model = Model()
    graph = Leaves().trace(model)
    gm = fx.GraphModule(model, graph)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    state = torch.get_rng_state()
    alone = all(len(n.all_input_nodes) == 1 and commutes_with_selection(gm, n, (2, 5, 12), 2) for n in nodes)
    assert alone == expected
    assert torch.equal(torch.get_rng_state(), state)
