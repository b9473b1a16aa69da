"""Regions joined where channels flow from one to the other, through code that no trace could follow.

The layers of a feed-forward block often stand in modules, or between lines, that cannot be traced. What flows between
them (`fxlrd.capturing.flow`) is a region all the same, if it treats each channel alone and nothing else reads it:

    x ─ producer(s) ─ activation, product … ─ consumer   →   one graph from x to what the consumer makes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from fxlrd.capturing.flow import flow
from fxlrd.capturing.proof import Original
from fxlrd.errors import Reason
from fxlrd.graph.channels import Group, group_of
from fxlrd.graph.surgery import calls, layers


@dataclass(frozen=True)
class Joined:
    """What flows from some layers to another one.

    Attributes:
        starts: the layers that all read the same tensor.
        ends: the layer that reads what they make.
        graph: from that tensor to what ``ends`` makes, with the model's names for the modules that it calls.
    """

    starts: tuple[str, ...]
    ends: str
    graph: fx.GraphModule

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers in it."""
        return (*self.starts, self.ends)


def joined(original: Original, alone: Iterable[str], blocked: Mapping[str, Reason]) -> list[Joined]:
    """Return how layers that are regions ``alone`` are joined; each is in one at most.

    ``blocked`` are the modules that must not be replaced.
    """
    free = set(alone)
    if len(free) < 2:
        return []
    try:
        gm = flow(original.model, original.inputs)
    except Exception:  # code that fails under the recording of its functions is left in the regions that it has
        return []
    pieces = []
    for name in layers(gm):
        if name not in free:
            continue
        group = group_of(gm, calls(gm, name)[0], blocked)
        if isinstance(group, Reason) or not free.issuperset(group.cut):
            continue
        piece = _piece(gm, group)
        if piece is not None:
            pieces.append(piece)
            free -= set(piece.layers)
    return pieces


def _piece(gm: fx.GraphModule, group: Group) -> Joined | None:
    """Return the flow of a group from one tensor to its one consumer, the same in all calls; None if it is not so."""
    starts = [str(producer.node.target) for producer in group.producers]
    ends = {str(consumer.node.target) for consumer in group.consumers}
    if len(ends) != 1 or ends & set(starts):
        return None
    (end,) = ends
    chains = [_chain(gm, [*starts], end, i) for i in range(len(calls(gm, end)))]
    first = chains[0]
    if first is None or any(chain is None or _shown(chain) != _shown(first) for chain in chains):
        return None
    if any(len(calls(gm, start)) != len(chains) for start in starts):
        return None
    return Joined(tuple(starts), end, _graph(gm, first))


def _chain(gm: fx.GraphModule, starts: list[str], end: str, index: int) -> list[fx.Node] | None:
    """Return the nodes between call number ``index`` of the layers, these included, after the one that they read."""
    first = {calls(gm, start)[index] for start in starts if len(calls(gm, start)) > index}
    inside, waiting = set(first), [calls(gm, end)[index]]
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        if node.op == "placeholder" or (node.op == "call_module" and str(node.target) in starts):
            return None
        inside.add(node)
        waiting += node.all_input_nodes
    read = {value for node in first for value in node.all_input_nodes}
    if len(read) != 1:
        return None
    return [*read, *(node for node in gm.graph.nodes if node in inside)]


def _shown(chain: list[fx.Node]) -> list[object]:
    """Return what is the same in two chains that compute the same."""
    position = {node: i for i, node in enumerate(chain)}
    return [
        (node.op, node.target, fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{position[n]}"))
        for node in chain[1:]
    ]


def _graph(gm: fx.GraphModule, chain: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    values = {chain[0]: graph.placeholder("x")}
    for node in chain[1:]:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(values[chain[-1]])
    return fx.GraphModule(gm, graph)
