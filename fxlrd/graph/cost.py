"""What a model costs: parameters, FLOPs, depth."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx, nn

from fxlrd.graph import facts
from fxlrd.layers.kinds import LAYERS


class Cost(NamedTuple):
    """Parameters, and FLOPs (2 × multiply-adds) for the example inputs."""

    params: int
    flops: int


NOTHING = Cost(0, 0)


def params(module: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


def flops(gm: fx.GraphModule) -> int:
    """Return the FLOPs of the graph (2 × multiply-adds) for the inputs it was last propagated with."""
    return sum(facts.flops(n) for n in gm.graph.nodes)


def depth(gm: fx.GraphModule) -> int:
    """Return the number of conv and linear layers on the longest path from an input to an output."""
    longest: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        is_layer = node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), LAYERS)
        longest[node] = max((longest[n] for n in node.all_input_nodes), default=0) + is_layer
    return max(longest.values(), default=0)
