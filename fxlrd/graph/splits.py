"""Nodes that take a tensor apart along its channels into equal parts: chunk, split, gated linear units."""

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
    """Return what a node takes apart along ``axis`` of the tensor that it reads: chunk, split, glu; None otherwise."""
    sizes = shape(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else None
    if sizes is None or len(sizes) <= axis:
        return None
    if _is_glu(gm, node, axis - len(sizes)):
        return Split(2, (node,))
    how = _split_arguments(node)
    if how is None or how[1] not in (axis, axis - len(sizes)):
        return None
    parts = how[0] if node.target in _CHUNKS else _number_of_parts(how[0], sizes[axis])
    takes = tuple(node.users)
    if not isinstance(parts, int) or parts < 2 or sizes[axis] % parts:
        return None
    return Split(parts, takes) if all(_takes_a_part(user) for user in takes) else None


def set_part_size(node: fx.Node, size: int) -> None:
    """Make a node of a `Split` take parts of ``size`` channels."""
    if node.target not in _SPLITS:
        return
    sizes = node.args[1] if len(node.args) > 1 else None
    name = next((k for k in ("split_size_or_sections", "split_size", "split_sizes") if k in node.kwargs), None)
    old = sizes if name is None else node.kwargs[name]
    new = [size] * len(old) if isinstance(old, (list, tuple)) else size
    if name is None:
        node.update_arg(1, new)
    else:
        node.update_kwarg(name, new)


_CHUNKS = {torch.chunk, "chunk"}
_SPLITS = {torch.split, "split", torch.functional.split}


def _split_arguments(node: fx.Node) -> tuple[Any, Any] | None:
    """Return how a node splits, number or sizes, and along which axis."""
    if node.target not in _CHUNKS | _SPLITS:
        return None
    named = node.kwargs
    how = node.args[1] if len(node.args) > 1 else next((v for k, v in named.items() if k not in ("dim", "input")), None)
    return how, node.args[2] if len(node.args) > 2 else named.get("dim", 0)


def _number_of_parts(sizes: Any, total: int) -> int | None:
    if isinstance(sizes, (list, tuple)):
        return len(sizes) if len(set(sizes)) == 1 else None
    return total // sizes if isinstance(sizes, int) and sizes > 0 and total % sizes == 0 else None


def _takes_a_part(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _is_glu(gm: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether the node is a gated linear unit along ``axis``, counted from the last."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, nn.GLU) and bool(module.dim == axis)
    if node.target is not F.glu:
        return False
    along: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return bool(along == axis)
