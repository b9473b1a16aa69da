"""Graphs built node by node, and what a diff says of two of them in short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxlrd.differences.model import Diff

Build = Callable[[fx.Graph, fx.Node], Any]


def graph_module(build: Build, **modules: nn.Module) -> fx.GraphModule:
    """Return a graph of one argument whose output is ``build(graph, argument)``."""
    root = nn.Module()
    for name, module in modules.items():
        setattr(root, name, module)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(build(graph, x))
    return fx.GraphModule(root, graph)


def chain(text: str) -> Build:
    """Return what builds a chain such as ``a !relu b``: calls of modules and, after ``!``, of functional ones."""

    def build(graph: fx.Graph, value: fx.Node) -> fx.Node:
        for name in text.split():
            if name.startswith("!"):
                value = graph.call_function(getattr(F, name[1:]), (value,))
            else:
                value = graph.call_module(name, (value,))
        return value

    return build


def change_kinds(diff: Diff) -> dict[str, str]:
    """Return the kind of each change by its name."""
    return {change.name: change.kind for change in diff.changes}
