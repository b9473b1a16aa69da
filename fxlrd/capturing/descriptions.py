"""A trace that asks a layer for the dtype, device or shape of its weight, without the weight.

torch.fx records ``x.to(self.fc.weight.dtype)`` as a read of the weight, so that the layer could not be replaced. A
shape does not change. Dtype and device are asked of an empty tensor of the graph's own. It is a buffer, so that
``half()`` and ``to()`` of the graph convert it with the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from fxlrd.graph.surgery import attribute

_OF_SHAPE = {"shape", "ndim", "size", "dim", "ndimension", "numel", "nelement"}
_OF_KIND = {"dtype", "device", "layout", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta"}
_KIND_METHODS = {"is_floating_point", "is_complex", "element_size", "get_device"}
_LIKE = {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_CONVERTING = {"to", "type_as"}


def without_described_weights(graph: fx.Graph, model: nn.Module, layers: Collection[str], prefix: str) -> set[str]:
    """Ask no layer in ``layers`` for a weight that is only described; return the names of those that were asked.

    The empty tensors become attributes of ``model``, with names that begin with ``prefix``.
    """
    described = set()
    for node in list(graph.find_nodes(op="get_attr")):
        layer = str(node.target).rpartition(".")[0]
        if layer not in layers or not all(_describes(user, node) for user in node.users):
            continue
        described.add(layer)
        weight = attribute(model, str(node.target))
        for user in list(node.users):
            if _name(user) in _OF_SHAPE:
                _replace_by_value(user, getattr(weight, _name(user)))
        if node.users:
            node.target = _empty_like(weight, model, prefix)
        else:
            graph.erase_node(node)
    return described


def _describes(user: fx.Node, weight: fx.Node) -> bool:
    """Whether the user of a weight reads dtype, device or shape of it alone."""
    if user.op == "call_function" and user.target is getattr:
        return _name(user) in _OF_SHAPE | _OF_KIND
    if user.op == "call_function" and user.target in (torch.is_floating_point, torch.is_complex):
        return True
    if user.op != "call_method":
        return False
    if _name(user) in _CONVERTING:
        return user.args[0] is not weight
    return _name(user) in _OF_SHAPE | _KIND_METHODS | _LIKE


def _name(user: fx.Node) -> str:
    return str(user.args[1] if user.target is getattr else user.target)


def _replace_by_value(user: fx.Node, value: Any) -> None:
    """Give the nodes that use a size of a weight the size itself."""
    if callable(value):
        value = value(*user.args[1:], **user.kwargs)
    value = tuple(value) if isinstance(value, torch.Size) else value

    def inserted(node: fx.Node) -> Any:
        return value if node is user else node

    for following in list(user.users):
        following.args = fx.map_arg(following.args, inserted)
        following.kwargs = fx.map_arg(following.kwargs, inserted)
    user.graph.erase_node(user)


def _empty_like(weight: torch.Tensor, model: nn.Module, prefix: str) -> str:
    name = f"{prefix}_like_{str(weight.dtype)[6:]}_{weight.device.type}{weight.device.index or ''}"
    if not hasattr(model, name):
        setattr(model, name, torch.empty(0, dtype=weight.dtype, device=weight.device))
    return name
