"""How long what stands between the layers of a channel group takes: norms, activations, sums."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxlrd.graph.channels import Group
from fxlrd.graph.facts import tensor_meta, times
from fxlrd.graph.inputs import Inputs
from fxlrd.timing.stopwatch import Stopwatch
from fxlrd.timing.workload import Workload, example, layout


def time_between(gm: fx.GraphModule, group: Group, stopwatch: Stopwatch) -> float:
    """Return the seconds that all between a group's layers takes, with all channels: norms, activations, sums.

    0 where a value that is read there has no shape that is known.
    """
    among = set(group.between)
    inside = [node for node in gm.graph.nodes if node in among]
    graph, read = _alone(inside)
    metas = [meta for node in read if (meta := tensor_meta(node)) is not None]
    if not inside or len(metas) < len(read):
        return 0.0
    device = next(gm.get_submodule(str(group.producers[0].node.target)).parameters()).device

    def workload() -> Workload:
        inputs = tuple(example(tuple(meta.shape), meta.dtype, layout(meta), device) for meta in metas)
        return Workload([(fx.GraphModule(gm, graph), Inputs(inputs))], stopwatch.under_inductor)

    shapes = ", ".join(f"{str(meta.dtype)[6:]}{list(meta.shape)} {layout(meta)}" for meta in metas)
    key = f"between the layers of a channel group: {_text(gm, graph)} on {shapes}"
    return times(inside[0]) * stopwatch.times(key, device, {"all": workload})["all"].seconds


def _alone(inside: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """Return a graph of some nodes, which gives all that others read of them, and the nodes that it has for inputs.

    What is no tensor, as the size of one, is computed in it.
    """
    among, graph = set(inside), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    read: list[fx.Node] = []

    def value(node: fx.Node) -> fx.Node:
        if node in values:
            return values[node]
        if node not in among and (tensor_meta(node) is not None or not node.all_input_nodes):
            read.append(node)
            values[node] = graph.placeholder(f"x{len(read)}")
        else:
            for argument in node.all_input_nodes:
                value(argument)
            values[node] = graph.node_copy(node, values.__getitem__)
        return values[node]

    for node in inside:
        value(node)
    graph.output(tuple(values[node] for node in inside if not among.issuperset(node.users)))
    return graph, read


def _text(gm: fx.GraphModule, graph: fx.Graph) -> str:
    """Return a graph as text that has no names in it."""
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        what = node._pretty_print_target(node.target) if module is None else f"{type(module).__module__} {module!r}"
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        lines.append("input" if node.op == "placeholder" else f"{what} {arguments}")
    return "; ".join(lines)
