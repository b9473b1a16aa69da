"""Nodes that take a tensor apart along its channels into equal parts: chunk, gated linear units.

A split by a number of channels is none: the code counts on that number.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlrd.graph.facts import shape


@dataclass(frozen=True)
class Split:
    """A node that takes a tensor apart along its channels.

    Attributes:
        parts: the number of equal parts.
        values: the nodes whose values are the parts, or what is computed of all parts entry by entry.
    """

    parts: int
    values: tuple[fx.Node, ...]


def split_of(gm: fx.GraphModule, node: fx.Node, axis: int) -> Split | None:
    """Return what a node takes apart along ``axis`` of the tensor that it reads: chunk, glu; None otherwise."""
    sizes = shape(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else None
    if sizes is None or len(sizes) <= axis:
        return None
    if _is_glu(gm, node, axis - len(sizes)):
        return Split(2, (node,))
    if node.target not in (torch.chunk, "chunk"):
        return None
    parts, along = _parts_and_axis(node)
    if along not in (axis, axis - len(sizes)) or not isinstance(parts, int) or parts < 2 or sizes[axis] % parts:
        return None
    takes = tuple(node.users)
    return Split(parts, takes) if all(_takes_a_part(user) for user in takes) else None


def _parts_and_axis(node: fx.Node) -> tuple[Any, Any]:
    named = node.kwargs
    parts = node.args[1] if len(node.args) > 1 else named.get("chunks")
    return parts, node.args[2] if len(node.args) > 2 else named.get("dim", 0)


def _takes_a_part(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _is_glu(gm: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether the node is a gated linear unit along ``axis``, counted from the last."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) is nn.GLU and bool(module.dim == axis)
    if node.target is not F.glu:
        return False
    along: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return bool(along == axis)
