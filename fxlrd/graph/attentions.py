"""Attention modules of torch inside a model, and putting open ones in their place.

An open attention (`fxlrd.layers.attention`) calls its projections as layers. Where no pass replaced one of these, a
model keeps the attention that it had.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxlrd.graph.facts import Fact
from fxlrd.graph.placing import put
from fxlrd.layers.attention import PROJECTIONS, ProjectedAttention

READERS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
"""The arguments that projections read."""
_MASKS = ("attn_mask", "key_padding_mask")


def is_closed(module: nn.Module) -> bool:
    """Whether the module is an attention of torch's own, whose projections are no layers."""
    return type(module) is nn.MultiheadAttention


def attention_of(projection: str) -> str | None:
    """Return the name of the attention that a layer would be a projection of, by its name; None for other names."""
    holder, _, role = projection.rpartition(".")
    return holder if holder and role in PROJECTIONS else None


def open_for(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Open the attentions of a model, in place, that the ``layers`` are projections of; return them as they were.

    They are returned under all of their names. One that has several stays one module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {id(modules[name]) for layer in layers if (name := attention_of(layer)) in modules}
    opened: dict[int, ProjectedAttention] = {}
    closed: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and is_closed(module) and id(module) in wanted:
            if id(module) not in opened:
                opened[id(module)] = ProjectedAttention.around(module)
            closed[name] = module
    put(model, {name: opened[id(module)] for name, module in closed.items()})
    return closed


def with_siblings(model: nn.Module, names: Iterable[str], layers: Iterable[str]) -> set[str]:
    """Return ``names``, and those of the ``layers`` that are projections of the same closed attention of the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = set(names)
    attentions = {name for layer in names if (name := attention_of(layer)) in modules and is_closed(modules[name])}
    return names | {layer for layer in layers if attention_of(layer) in attentions}


@dataclass(frozen=True)
class AttentionPart:
    """What a node in the trace of an open attention is in it.

    Attributes:
        name: the attention's name.
        call: the number of the call of it.
        argument: the argument of the call that is the node's first input, where it is the node to tell it.
        output: the index of the call's output that it is, or None.
        options: the arguments of the call that are constants.
    """

    name: str
    call: int
    argument: str | None = None
    output: int | None = None
    options: tuple[tuple[str, Any], ...] = ()


attention_part = Fact("attention_part", AttentionPart)
"""The part that a node has in the call of an attention that was traced open."""


def record_parts(
    name: str,
    call: int,
    nodes: Sequence[fx.Node],
    readers: Mapping[fx.Node, str],
    arguments: Mapping[str, Any],
    outputs: Sequence[Any],
) -> None:
    """Record on the nodes that a call of an open attention was traced to what they are in it.

    ``readers`` are the nodes of projections, each with the argument that it reads; ``arguments`` are those of the call,
    by name, and ``outputs`` what it gave: nodes or constants.
    """
    options = tuple((key, value) for key, value in arguments.items() if not isinstance(value, fx.Node))
    masks = {value: key for key in _MASKS if isinstance(value := arguments.get(key), fx.Node)}
    for node in nodes:
        argument = readers.get(node)
        if argument is None and node.args and isinstance(node.args[0], fx.Node):
            argument = masks.pop(node.args[0], None)
        output = outputs.index(node) if node in outputs else None
        attention_part.record(node, AttentionPart(name, call, argument, output, options))


def projections_in(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Return the calls of the first three projections among ``nodes``, each with the argument that it reads."""
    roles = {node: str(node.target).rpartition(".")[2] for node in nodes if node.op == "call_module"}
    return {node: READERS[role] for node, role in roles.items() if role in READERS}


Parts = Mapping[fx.Node, AttentionPart]
"""The nodes of one call of an open attention, in the order of the graph."""


def parts_of_calls(gm: fx.GraphModule) -> list[Parts]:
    """Return the nodes of each call of an attention that was traced open."""
    calls: dict[tuple[str, int], dict[fx.Node, AttentionPart]] = {}
    for node in gm.graph.nodes:
        if (part := attention_part(node)) is not None:
            calls.setdefault((part.name, part.call), {})[node] = part
    return list(calls.values())


def close(gm: fx.GraphModule, closed: Mapping[str, nn.Module]) -> None:
    """Put attentions as they were in the place of what calls of open ones were traced to, in place, by their names."""
    for parts in parts_of_calls(gm):
        name = next(iter(parts.values())).name
        if name in closed:
            close_call(gm.graph, parts, partial(gm.graph.call_module, name))
            gm.set_submodule(name, closed[name])


def close_call(graph: fx.Graph, parts: Parts, make: Callable[[tuple[Any, ...], dict[str, Any]], fx.Node]) -> None:
    """Put one node in the place of all that a call was traced to: what ``make`` makes of its arguments."""
    arguments = {part.argument: node.args[0] for node, part in parts.items() if part.argument is not None}
    arguments |= dict(next(iter(parts.values())).options)
    outputs = {part.output: node for node, part in parts.items() if part.output is not None}
    inputs = tuple(arguments.pop(key) for key in READERS.values())
    with graph.inserting_before(next(iter(outputs.values()))):
        call = make(inputs, arguments)
        for index, node in outputs.items():
            node.replace_all_uses_with(graph.call_function(operator.getitem, (call, index)))
    for node in reversed(list(parts)):
        graph.erase_node(node)


def untouched(gm: fx.GraphModule, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the attentions that were traced open and of which the graph has all of the four ``layers`` as they were.

    Those that are told to be causal are not among them: their trace does not read the mask that they are called with.
    """
    parts = [part for node in gm.graph.nodes if (part := attention_part(node)) is not None]
    names = {part.name for part in parts} - {part.name for part in parts if dict(part.options).get("is_causal")}
    targets = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}

    def is_as_it_was(layer: str) -> bool:
        return layer in layers and layer in targets and gm.get_submodule(layer) is layers[layer]

    return {name for name in names if all(is_as_it_was(f"{name}.{role}") for role in PROJECTIONS)}


def inside(layers: Collection[str], modules: Collection[str]) -> set[str]:
    """Return those of the ``layers`` that are projections of attentions among the ``modules``."""
    return {layer for layer in layers if attention_of(layer) in modules}


def fuse_unread_weights(graph: fx.Graph) -> None:
    """Let open attentions whose weights nobody reads call scaled_dot_product_attention, in place.

    Callers of nn.MultiheadAttention get the weights unless they say otherwise, and few read them. What computed them is
    left without users.
    """
    for softmax in list(graph.find_nodes(op="call_function", target=F.softmax)):
        part, user = attention_part(softmax), _only_user(softmax)
        dropout = user if user is not None and user.target is F.dropout else None
        output = _only_user(dropout) if dropout is not None else user
        if part is None or output is None or output.target is not operator.matmul:
            continue
        scores, mask = softmax.args[0], None
        if scores.target is operator.add:
            scores, mask = scores.args
        scaled, transposed = scores.args
        with graph.inserting_before(output):
            p = 0.0 if dropout is None else graph.call_function(operator.mul, _rate_and_mode(dropout))
            values = (scaled.args[0], transposed.args[0], output.args[1], mask, p)
            fused = graph.call_function(F.scaled_dot_product_attention, values)
        fused.meta = dict(output.meta)
        if isinstance(p, fx.Node):
            p.meta = dict(output.meta)
        output.replace_all_uses_with(fused)
        graph.erase_node(output)


def _rate_and_mode(dropout: fx.Node) -> tuple[Any, Any]:
    options = {**dict(zip(("p", "training"), dropout.args[1:], strict=False)), **dropout.kwargs}
    return options["p"], options["training"]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
