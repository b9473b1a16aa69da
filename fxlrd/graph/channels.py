"""Which nodes share one set of channels: producers, the operations between that treat each channel alone, consumers.

Selecting channels of a tensor commutes with every operation that acts on each channel alone. A `Group` is everything
that has to be cut together: the layers that make the channels, the modules on the way that have parameters for each
(BatchNorm, depthwise conv, PReLU), and the layers that read them. A layer may make several parts of as many channels
each, which are split and multiplied (gated linear units): then channel j is row j of each part. Where several layers'
outputs are added up, as along a residual stream, channel j is row j of each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.captured import Regions, captured
from fxlrd.graph.facts import shape
from fxlrd.graph.operations import PRODUCTS, SUMS, is_elementwise, is_flatten, reads_only_batch_size, takes_two_tensors
from fxlrd.graph.splits import split_of
from fxlrd.graph.surgery import calls
from fxlrd.graph.values import Unshaped, Values
from fxlrd.layers.kinds import op

MERGEABLE = (nn.Conv2d, nn.Linear)
"""The layers whose channels are cut."""
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Producer:
    """A layer that makes the group's channels.

    Attributes:
        node: its first call.
        parts: the number of equal parts that its outputs are split into, with the group's channels in each.
    """

    node: fx.Node
    parts: int = 1

    def rows(self, channels: Tensor, count: int) -> Tensor:
        """Return which outputs make ``channels``, as indices, of the group's ``count``."""
        return torch.cat([channels + part * count for part in range(self.parts)])


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the group's channels.

    Attributes:
        node: its first call.
        source: the node whose value that reads.
        block: the number of its input features that belong to one channel: several after a flatten.
    """

    node: fx.Node
    source: fx.Node
    block: int = 1


@dataclass
class Group:
    """Layers that share C channels.

    A layer that is called several times is here once; all its calls belong to the group.

    Attributes:
        channels: C.
        producers: the layers that make the channels; several where their outputs are multiplied or added up.
        through: first calls of modules between, with parameters or buffers for each channel.
        consumers: the layers that read the channels.
        between: all nodes between whose values have the channels, in no order.
    """

    channels: int
    producers: list[Producer] = field(default_factory=list)
    through: list[fx.Node] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    between: list[fx.Node] = field(default_factory=list)

    @property
    def cut(self) -> list[str]:
        """The names of the layers that retaining fewer channels cuts."""
        return list(dict.fromkeys(str(node.target) for node in self.layers))

    @property
    def layers(self) -> list[fx.Node]:
        """The first calls of the producers and consumers."""
        return [*(producer.node for producer in self.producers), *(consumer.node for consumer in self.consumers)]


def group_of(
    gm: fx.GraphModule, producer: fx.Node, reasons: Mapping[str, Reason | None], sums: bool = False
) -> Group | Reason:
    """Return the group of the channels that layer call ``producer`` makes, or why it has none.

    ``reasons`` says which modules must not be replaced (`fxlrd.graph.guards.why_not_replaceable`, with norms). With
    ``sums``, layers whose outputs are added up make the channels together.
    """
    walk = _Walk(gm, producer, reasons, sums)
    try:
        walk.run(producer)
    except _Mixes as stop:
        return stop.reason
    except Unshaped:
        return Reason("no-shapes", "shapes are not known", "give example inputs")
    return walk.group if walk.group.consumers else Reason("unread", "no layer reads its output")


class _Mixes(Exception):
    """The walk met something that does not treat each channel alone, or cannot be cut."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Walk:
    """A walk over the graph that collects one group."""

    def __init__(self, gm: fx.GraphModule, producer: fx.Node, reasons: Mapping[str, Reason | None], sums: bool) -> None:
        self.gm = gm
        self.reasons = reasons
        self.sums = sums
        module = gm.get_submodule(str(producer.target))
        self.linear = isinstance(module, nn.Linear)
        self.values = Values(gm, self.linear)
        self.group = Group(_out_channels(module) // self._parts(producer))
        self.visited: set[fx.Node] = set()
        self.added: list[fx.Node] = []
        capture = captured(gm)
        self.fixed = capture.fixed_widths if isinstance(capture, Regions) else frozenset()

    def run(self, producer: fx.Node) -> None:
        """Collect the group: sums one by one, as there may be hundreds along a residual stream."""
        self.backward(producer)
        while self.added:
            node = self.added.pop()
            self.visited.discard(node)
            self.forward(node, 1)
            self._follow_operands(node)
        made = self._made()
        self.group.between = [node for node in self.visited if node not in made]

    def backward(self, node: fx.Node) -> None:
        """Add the producer of a node's value, which carries the channels, and follow them from there."""
        if node in self.visited:
            return
        if (module := self.values.mixing_layer(node)) is not None:
            self._take_producer(node, module)
        elif (split := self.values.split(node)) is not None:
            self.backward(split.all_input_nodes[0])
        elif (carrier := self.values.carrier(node)) is not None:
            self.backward(carrier)
        elif node.target in PRODUCTS and takes_two_tensors(node):
            self._take_product(node, 1)
        elif node.target in SUMS and takes_two_tensors(node):
            self._take_sum(node, 1)
        else:
            text = f"its output meets {_name(node)}, which no layer of {self.group.channels} channels feeds"
            raise _Mixes(Reason("mixed", text))

    def forward(self, node: fx.Node, block: int) -> None:
        """Follow the channels from ``node``, of ``block`` features each, to the layers that read them."""
        if node in self.visited:
            return
        self.visited.add(node)
        for user in node.users:
            if not self._passed(user):
                self._visit(user, node, block)

    def _passed(self, user: fx.Node) -> bool:
        """Whether a reader of the channels is none, or was seen to: one that makes the channels may read them too."""
        return reads_only_batch_size(user) or (user in self.visited and self.values.mixing_layer(user) is None)

    def _visit(self, user: fx.Node, node: fx.Node, block: int) -> None:
        if user.op == "output":
            raise _Mixes(Reason("model-output", "its output is an output of the model"))
        self._check_added(user)
        if (module := self.values.mixing_layer(user)) is not None:
            self._take_consumer(user, node, module, block)
        elif is_flatten(self.gm, user) and not self.linear and block == 1:
            self.forward(user, math.prod(self.values.shape(node)[2:]) if self.values.dims(node) > 2 else 1)
        elif is_elementwise(self.gm, user) or (block == 1 and self.values.carrier(user) is node):
            self._take_through(user)
            self.forward(user, block)
        elif user.target in PRODUCTS and takes_two_tensors(user):
            self._take_product(user, block)
        elif user.target in SUMS and takes_two_tensors(user):
            self._take_sum(user, block)
        else:
            raise _Mixes(self._why_mixed(user))

    def _forward_packed(self, node: fx.Node, parts: int) -> None:
        """Follow a layer's outputs up to the node that splits them into ``parts``, and each part from there."""
        self.visited.add(node)
        for user in node.users:
            if self._passed(user):
                continue
            self._check_added(user)
            if (split := split_of(self.gm, user, self.values.axis(node))) is not None and split.parts == parts:
                for part in split.values:
                    self.forward(part, 1)
            elif self.values.stateless(user) and self.values.carrier(user) is node:
                self._forward_packed(user, parts)
            else:
                raise _Mixes(self._why_mixed(user))

    def _parts(self, node: fx.Node) -> int:
        """Return the number of parts that the outputs of a layer are split into further on; 1 if they are not."""
        while len(node.users) == 1:
            (user,) = node.users
            if (split := split_of(self.gm, user, self.values.axis(node))) is not None:
                return split.parts
            if not self.values.stateless(user) or self.values.carrier(user) is not node:
                return 1
            node = user
        return 1

    def _take_producer(self, node: fx.Node, module: nn.Module) -> None:
        self._check_type(node, module)
        parts = self._parts(node)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _Mixes(
                Reason("grouped", f"{node.target} has groups={module.groups}: its outputs cannot be cut one by one")
            )
        if _out_channels(module) != parts * self.group.channels or isinstance(module, nn.Linear) != self.linear:
            raise _Mixes(Reason("other-channels", f"{node.target} makes other channels that are multiplied in"))
        self._check(node)
        if str(node.target) in self.fixed:
            text = f"the model's code counts on the {_out_channels(module)} outputs of {node.target}"
            raise _Mixes(Reason("fixed-width", text, "use shapes of tensors there in the place of numbers"))
        first, *_ = nodes = calls(self.gm, str(node.target))
        if all(producer.node is not first for producer in self.group.producers):
            self.group.producers.append(Producer(first, parts))
        for call in nodes:
            if call in self.visited:
                continue
            if parts == 1:
                self.forward(call, 1)
            else:
                self._forward_packed(call, parts)

    def _take_consumer(self, node: fx.Node, source: fx.Node, module: nn.Module, block: int) -> None:
        self._check_type(node, module)
        conv = isinstance(module, nn.Conv2d)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _Mixes(Reason("grouped", f"{node.target} reads it with groups={module.groups}"))
        if (conv and self.linear) or (not self.linear and self.values.dims(source) != (4 if conv else 2)):
            raise _Mixes(Reason("other-axis", f"{node.target} reads it along another axis than the channels"))
        self._check(node)
        target = str(node.target)
        if any(str(consumer.node.target) == target for consumer in self.group.consumers):
            return
        first, *others = calls(self.gm, target)
        if others and block > 1:
            raise _Mixes(Reason("called-again", f"{target} is called more than once"))
        self.group.consumers.append(Consumer(first, source if first is node else _read(first), block))
        self._follow_back(first, *others)

    def _follow_back(self, *nodes: fx.Node) -> None:
        """Take in what feeds other calls of a module of the group."""
        for node in nodes:
            self.backward(_read(node))

    def _take_product(self, node: fx.Node, block: int) -> None:
        if block > 1:
            raise _Mixes(Reason("product-after-flatten", f"{_name(node)} multiplies it after it is flattened"))
        self.visited.add(node)
        self._follow_operands(node)
        self.visited.discard(node)
        self.forward(node, block)

    def _follow_operands(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            self.backward(operand)

    def _take_sum(self, node: fx.Node, block: int) -> None:
        """Follow a sum: later, if sums are; else one of the group's own channels, as in an activation written out."""
        if block == 1 and self.sums and self._aligned(node):
            self.visited.add(node)
            self.added.append(node)
        elif block == 1 and self.values.origins(node.all_input_nodes) <= self._made():
            self.forward(node, block)
        else:
            raise _Mixes(Reason("residual", f"its output joins a residual at {_name(node)}"))

    def _made(self) -> set[fx.Node]:
        """Return all calls of the producers so far."""
        return {call for producer in self.group.producers for call in calls(self.gm, str(producer.node.target))}

    def _aligned(self, node: fx.Node) -> bool:
        """Whether the channels are on the same axis in both operands."""
        sizes = [shape(operand) for operand in node.all_input_nodes]
        return all(size is not None and (self.linear or len(size) == len(sizes[0] or ())) for size in sizes)

    def _take_through(self, node: fx.Node) -> None:
        """Add the module that the node calls, if it has parameters or buffers."""
        if self.values.stateless(node):
            return
        self._check(node)
        first, *others = calls(self.gm, str(node.target))
        if first not in self.group.through:
            self.group.through.append(first)
            self.visited.add(node)
            self._follow_back(first, *others)
            self.visited.discard(node)

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

    def _check_added(self, node: fx.Node) -> None:
        """Stop at a module that does something else than its class: an activation with a hook."""
        if self.values.stateless(node) and (reason := self.values.why_other(node)) is not None:
            raise _Mixes(reason.at(str(node.target)))

    def _why_mixed(self, node: fx.Node) -> Reason:
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _NORMS) or node.target in (F.layer_norm, F.rms_norm, F.group_norm):
            return Reason("norm-over-channels", f"{_name(node)} normalises over the channels")
        return Reason("mixed", f"{_name(node)} does not treat each channel alone")


def _read(node: fx.Node) -> fx.Node:
    """Return the value that a module's call reads."""
    if len(node.all_input_nodes) != 1:
        raise _Mixes(Reason("called-again", f"{node.target} is called more than once, in other ways"))
    return node.all_input_nodes[0]


def _out_channels(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
