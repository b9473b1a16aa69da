"""Which nodes share one set of channels: producers, the operations between that treat each channel alone, consumers.

Selecting channels of a tensor commutes with every operation that acts on each channel alone. A `Group` is everything
that has to be cut together: the layers that make the channels, the modules on the way that have parameters for each
(BatchNorm, depthwise conv, PReLU), and the layers that read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.facts import shape
from fxlrd.graph.operations import (
    POOLING_FUNCTIONS,
    POOLING_MODULES,
    PRODUCTS,
    SUMS,
    is_elementwise,
    is_flatten,
    reads_only_batch_size,
    takes_two_tensors,
)
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.kinds import op

MERGEABLE = (nn.Conv2d, nn.Linear)
"""The layers whose channels are cut."""
MERGEABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""The BatchNorms that can stand between such layers: none of three dimensions."""


@dataclass(frozen=True)
class Consumer:
    """A layer's call that reads the group's channels.

    Attributes:
        node: the call.
        source: the node whose value it reads.
        block: the number of its input features that belong to one channel: several after a flatten.
    """

    node: fx.Node
    source: fx.Node
    block: int = 1


@dataclass
class Group:
    """Nodes that share C channels.

    Attributes:
        channels: C.
        producers: the layers that make the channels; several where their outputs are multiplied.
        through: modules between with parameters or buffers for each channel.
        consumers: the layers that read the channels.
    """

    channels: int
    producers: list[fx.Node] = field(default_factory=list)
    through: list[fx.Node] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)


def group_of(gm: fx.GraphModule, producer: fx.Node, reasons: Mapping[str, Reason | None]) -> Group | Reason:
    """Return the group of the channels that layer call ``producer`` makes, or why it has none.

    ``reasons`` says which modules must not be replaced (`fxlrd.graph.guards.why_not_replaceable`, with norms).
    """
    walk = _Walk(gm, producer, reasons)
    try:
        walk.backward(producer)
    except _Mixes as stop:
        return stop.reason
    return walk.group if walk.group.consumers else Reason("unread", "no layer reads its output")


class _Mixes(Exception):
    """The walk met something that does not treat each channel alone, or cannot be cut."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Walk:
    """A walk over the graph that collects one group."""

    def __init__(self, gm: fx.GraphModule, producer: fx.Node, reasons: Mapping[str, Reason | None]) -> None:
        self.gm = gm
        self.reasons = reasons
        self.layers = layers(gm)
        module = self.layers[str(producer.target)]
        self.linear = isinstance(module, nn.Linear)
        self.group = Group(_out_channels(module))
        self.visited: set[fx.Node] = set()

    def backward(self, node: fx.Node) -> None:
        """Add the producer of a node's value, which carries the channels, and follow them from there."""
        if node in self.visited:
            return
        if (module := self._mixing_layer(node)) is not None:
            self._take_producer(node, module)
            self.forward(node, 1)
        elif self._alone(node, 1) and node.all_input_nodes:
            self.backward(node.all_input_nodes[0])
        else:
            text = f"its output meets {_name(node)}, which no layer of {self.group.channels} channels feeds"
            raise _Mixes(Reason("mixed", text))

    def forward(self, node: fx.Node, block: int) -> None:
        """Follow the channels from ``node``, of ``block`` features each, to the layers that read them."""
        if node in self.visited:
            return
        self.visited.add(node)
        for user in node.users:
            if user not in self.visited and not reads_only_batch_size(user):
                self._visit(user, node, block)

    def _visit(self, user: fx.Node, node: fx.Node, block: int) -> None:
        if user.op == "output":
            raise _Mixes(Reason("model-output", "its output is an output of the model"))
        if (module := self._mixing_layer(user)) is not None:
            self._take_consumer(user, node, module, block)
        elif is_flatten(self.gm, user) and not self.linear and block == 1:
            self.forward(user, math.prod(_shape(node)[2:]) if self._dims(node) > 2 else 1)
        elif user.target in PRODUCTS and takes_two_tensors(user):
            self._take_product(user, block)
        elif user.target in SUMS and takes_two_tensors(user):
            raise _Mixes(Reason("residual", f"its output joins a residual at {_name(user)}"))
        elif self._alone(user, block):
            self._take_through(user)
            self.forward(user, block)
        else:
            raise _Mixes(Reason("mixed", f"{_name(user)} does not treat each channel alone"))

    def _mixing_layer(self, node: fx.Node) -> nn.Module | None:
        """Return the module of a layer's call, unless it is depthwise."""
        module = self.layers.get(str(node.target)) if node.op == "call_module" else None
        return None if module is None or self._depthwise(module) else module

    def _alone(self, node: fx.Node, block: int) -> bool:
        """Whether the operation acts on each channel by itself."""
        if is_elementwise(self.gm, node):
            return True
        if block > 1:
            return False
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if isinstance(module, nn.PReLU):
                return module.num_parameters in (1, self.group.channels) and not (self.linear and self._dims(node) > 2)
            if type(module) in MERGEABLE_NORMS:
                # On (N, L, C) a BatchNorm1d counts L as channels.
                return not (self.linear and self._dims(node) > 2)
            return not self.linear and (type(module) in POOLING_MODULES or self._depthwise(module))
        if node.target in (torch.mean, "mean"):
            return self._spatial_mean(node)
        return not self.linear and node.target in POOLING_FUNCTIONS

    def _spatial_mean(self, node: fx.Node) -> bool:
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return not self.linear and isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]

    def _depthwise(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1

    def _take_producer(self, node: fx.Node, module: nn.Module) -> None:
        self._check_type(node, module)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _Mixes(
                Reason("grouped", f"{node.target} has groups={module.groups}: its outputs cannot be cut one by one")
            )
        if _out_channels(module) != self.group.channels or isinstance(module, nn.Linear) != self.linear:
            raise _Mixes(Reason("other-channels", f"{node.target} makes other channels that are multiplied in"))
        self._check(node)
        if node not in self.group.producers:
            self.group.producers.append(node)

    def _take_consumer(self, node: fx.Node, source: fx.Node, module: nn.Module, block: int) -> None:
        self._check_type(node, module)
        conv = isinstance(module, nn.Conv2d)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _Mixes(Reason("grouped", f"{node.target} reads it with groups={module.groups}"))
        if (conv and self.linear) or (not self.linear and self._dims(source) != (4 if conv else 2)):
            raise _Mixes(Reason("other-axis", f"{node.target} reads it along another axis than the channels"))
        self._check(node)
        self.group.consumers.append(Consumer(node, source, block))

    def _take_product(self, node: fx.Node, block: int) -> None:
        if block > 1:
            raise _Mixes(Reason("product-after-flatten", f"{_name(node)} multiplies it after it is flattened"))
        self.visited.add(node)
        for operand in node.all_input_nodes:
            self.backward(operand)
        self.visited.discard(node)
        self.forward(node, block)

    def _take_through(self, node: fx.Node) -> None:
        """Add the module that the node calls, if it has parameters or buffers."""
        if node.op != "call_module" or not self.gm.get_submodule(str(node.target)).state_dict():
            return
        self._check(node)
        if node not in self.group.through:
            self.group.through.append(node)

    def _check_type(self, node: fx.Node, module: nn.Module) -> None:
        if not isinstance(module, MERGEABLE):
            raise _Mixes(
                Reason("layer-type", f"{node.target} is a {op(module)}: only Conv2d and Linear layers are merged")
            )

    def _check(self, node: fx.Node) -> None:
        target = str(node.target)
        reason = self.reasons.get(target)
        if reason is not None:
            raise _Mixes(reason.at(target))
        if len(calls(self.gm, target)) > 1:
            raise _Mixes(Reason("called-again", f"{target} is called more than once"))

    def _dims(self, node: fx.Node) -> int:
        return len(_shape(node))


def _shape(node: fx.Node) -> tuple[int, ...]:
    sizes = shape(node)
    if sizes is None:
        raise _Mixes(Reason("no-shapes", "shapes are not known", "give example inputs"))
    return sizes


def _out_channels(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
