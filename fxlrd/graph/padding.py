"""Padding before the calls of a layer, as nodes of the graph."""

from __future__ import annotations

from torch import fx
from torch.nn import functional as F

from fxlrd.graph.surgery import calls, source
from fxlrd.layers.padding import Padding


def insert_padding(gm: fx.GraphModule, name: str, padding: Padding) -> None:
    """Pad what each call of the module ``name`` reads. The graph module is not yet recompiled."""
    for node in calls(gm, name):
        value = source(node)
        assert value is not None, f"{name} is called with more than its input"
        with gm.graph.inserting_before(node):
            padded = padding.apply(fx.Proxy(value)).node
        node.replace_input_with(value, padded)


def remove_padding(gm: fx.GraphModule, name: str) -> None:
    """Undo `insert_padding`. The graph module is not yet recompiled."""
    for node in calls(gm, name):
        padded = source(node)
        assert padded is not None
        assert padded.target is F.pad, f"{name} reads {padded}, which is no padding"
        value = padded.args[0]
        assert isinstance(value, fx.Node)
        node.replace_input_with(padded, value)
        _erase_unused(padded)


def _erase_unused(node: fx.Node) -> None:
    """Erase a node that has no users, and what only that has used."""
    pending, erased = [node], set[fx.Node]()
    while pending:
        each = pending.pop()
        if each not in erased and not each.users and each.op in ("call_function", "call_method"):
            pending += each.all_input_nodes
            each.graph.erase_node(each)
            erased.add(each)
