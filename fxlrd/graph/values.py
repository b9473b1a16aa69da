"""What an operation does with the channels of a value: treats each alone, mixes them, takes them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.facts import shape
from fxlrd.graph.guards import added
from fxlrd.graph.operations import (
    ARITHMETIC,
    POOLING_FUNCTIONS,
    POOLING_MODULES,
    PRODUCTS,
    SUMS,
    is_elementwise,
    takes_two_tensors,
)
from fxlrd.graph.selection import commutes_with_selection
from fxlrd.graph.splits import split_of
from fxlrd.graph.surgery import layers
from fxlrd.layers.kinds import depthwise

MERGEABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""The BatchNorms that can stand between layers whose channels are cut: none of three dimensions."""


class Unshaped(Exception):
    """A node has no shape: the graph was not propagated."""


class Values:
    """The values of a graph, with channels on the last axis for Linear layers, on the second for convs."""

    def __init__(self, gm: fx.GraphModule, linear: bool) -> None:
        self.gm = gm
        self.linear = linear
        self.layers = layers(gm)

    def axis(self, node: fx.Node) -> int:
        """Return the axis of the channels in a node's value."""
        return self.dims(node) - 1 if self.linear else 1

    def dims(self, node: fx.Node) -> int:
        """Return the number of axes of a node's value."""
        return len(self.shape(node))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's value. Raises Unshaped."""
        sizes = shape(node)
        if sizes is None:
            raise Unshaped
        return sizes

    def mixing_layer(self, node: fx.Node) -> nn.Module | None:
        """Return the module of a layer's call, unless it is depthwise."""
        module = self.layers.get(str(node.target)) if node.op == "call_module" else None
        return None if module is None or _depthwise(module) else module

    def carrier(self, node: fx.Node) -> fx.Node | None:
        """Return the input whose channels the operation treats each by itself, or None."""
        inputs = node.all_input_nodes
        if len(inputs) == 1:
            return inputs[0] if self._alone(node, inputs[0]) else None
        if len(inputs) == 2 and node.target in ARITHMETIC and takes_two_tensors(node):
            return next((a for a, b in (inputs, inputs[::-1]) if self._alike_for_channels(b, a)), None)
        return None

    def split(self, node: fx.Node) -> fx.Node | None:
        """Return the node that splits what the node is a part of, or None."""
        for split in (node, *node.all_input_nodes[:1]):
            read = split.all_input_nodes[:1]
            parts = split_of(self.gm, split, self.axis(read[0])) if read and shape(read[0]) is not None else None
            if parts is not None and node in parts.values:
                return split
        return None

    def origins(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Return the nodes that the channels of values come from: calls of layers, or what mixes channels."""
        origins, visited, waiting = set(), set(), list(nodes)
        while waiting:
            node = waiting.pop()
            if node in visited:
                continue
            visited.add(node)
            if self.mixing_layer(node) is not None:
                origins.add(node)
            elif (split := self.split(node)) is not None:
                waiting.append(split.all_input_nodes[0])
            elif (carrier := self.carrier(node)) is not None:
                waiting.append(carrier)
            elif node.target in PRODUCTS | SUMS and takes_two_tensors(node):
                waiting += node.all_input_nodes
            else:
                origins.add(node)
        return origins

    def why_other(self, node: fx.Node) -> Reason | None:
        """Return why a call does something else than the class of its module: hooks, a forward of its own."""
        return added(self.gm.get_submodule(str(node.target))) if node.op == "call_module" else None

    def stateless(self, node: fx.Node) -> bool:
        """Whether the node calls no module that has parameters or buffers."""
        return node.op != "call_module" or not self.gm.get_submodule(str(node.target)).state_dict()

    def _alone(self, node: fx.Node, read: fx.Node) -> bool:
        """Whether the operation, which reads one value, acts on each channel by itself."""
        if self.why_other(node) is not None:
            return False
        if is_elementwise(self.gm, node):
            return True
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if type(module) is nn.PReLU:
                one_each = module.num_parameters in (1, self.shape(read)[self.axis(read)])
                return one_each and self.axis(read) == 1
            if type(module) in MERGEABLE_NORMS:
                return self.axis(read) == 1  # on (N, L, C) a BatchNorm1d counts L as channels
            if not self.linear and (type(module) in POOLING_MODULES or _depthwise(module)):
                return True
        if node.target in (torch.mean, "mean"):
            return self._spatial_mean(node)
        if not self.linear and node.target in POOLING_FUNCTIONS:
            return True
        sizes, made = shape(read), shape(node)
        if sizes is None or made is None or len(sizes) != len(made) or len(sizes) < 2:
            return False
        return commutes_with_selection(self.gm, node, sizes, self.axis(read))

    def _alike_for_channels(self, other: fx.Node, carrier: fx.Node) -> bool:
        """Whether an operand has one value for all channels of the other one."""
        sizes, carried = shape(other), shape(carrier)
        if sizes is None or carried is None or len(sizes) > len(carried):
            return False
        from_right = len(carried) - self.axis(carrier)
        return len(sizes) < from_right or sizes[-from_right] == 1

    def _spatial_mean(self, node: fx.Node) -> bool:
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return not self.linear and isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]


def _depthwise(module: nn.Module) -> bool:
    return depthwise(module) and module.in_channels == module.out_channels
