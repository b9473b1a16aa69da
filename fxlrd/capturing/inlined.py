"""Products in a trace that read the weight of a layer, as calls of that layer.

Some attentions give the weight of a Linear to a function, with a bias that they put together (BEiT, EVA-02, Swin V2):

    linear(x, self.qkv.weight, bias)                  →     self.qkv(x) + bias
    linear(x, self.fc.weight, self.fc.bias)           →     self.fc(x)
    x @ self.fc.weight.T                              →     self.fc(x)
    conv2d(x, self.conv.weight, None, stride, …)      →     self.conv(x)

so that it is a layer like any other. The user's own forward still reads the weight: only a graph can have it so.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fxlrd.layers.functions import CALLS, FUNCTIONS, arguments_of
from fxlrd.layers.kinds import Conv, ConvOrLinear, make, options, stock_type
from fxlrd.layers.stand_ins import stand_in

_MATRIX_PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
_TRANSPOSED = ("t", "T", "mT", "transpose", "swapaxes")


def call_inlined_layers(gm: fx.GraphModule, model: nn.Module) -> None:
    """Let the graph of a model call layers in the place of functions that read their weights, where it is the same."""
    layers: dict[str, ConvOrLinear | None] = {}
    for node in list(gm.graph.nodes):
        read = _arguments(node)
        name = _owner(read.get("weight"), "weight")
        if name is None:
            continue
        if name not in layers:
            layers[name] = _layer(model, name)
        if (layer := layers[name]) is not None and _computes(layer, name, node, read):
            gm.set_submodule(name, layer)
            _replace(node, name, read)
    if any(layers.values()):
        for node in list(gm.graph.find_nodes(op="get_attr")):
            if not node.users:
                gm.graph.erase_node(node)
        gm.recompile()


def _arguments(node: fx.Node) -> Mapping[str, Any]:
    """Return the input, weight and bias, and a conv's options, of a product, by name; nothing for other nodes."""
    if node.op == "call_function" and node.target in CALLS:
        return arguments_of(node.target, node.args, node.kwargs)
    if node.op in ("call_function", "call_method") and node.target in _MATRIX_PRODUCTS and len(node.args) == 2:
        value, weight = node.args
        if isinstance(weight, fx.Node) and _transposes(weight):
            return {"input": value, "weight": weight.args[0], "bias": None}
    return {}


def _transposes(node: fx.Node) -> bool:
    """Whether the node transposes a matrix."""
    if node.target is getattr:
        return node.args[1] in _TRANSPOSED
    name = str(getattr(node.target, "__name__", node.target))
    axes = {int(axis) % 2 for axis in node.args[1:] if isinstance(axis, int)}
    return name in _TRANSPOSED and not node.kwargs and axes in (set(), {0, 1})


def _owner(node: Any, parameter: str) -> str | None:
    """Return the name of the module whose parameter the node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    name, _, read = str(node.target).rpartition(".")
    return name if name and read == parameter else None


def _layer(model: nn.Module, name: str) -> ConvOrLinear | None:
    """Return a stock layer around the parameters of a layer of the model; None for what is none."""
    module = model.get_submodule(name)
    like = None if is_parametrized(module) else stand_in(module)
    if like is None or like.weight is not module.weight:
        return None
    layer = make(stock_type(like), options(like))
    assert isinstance(layer, nn.Linear | Conv)
    layer.weight, layer.bias = like.weight, like.bias
    return layer.train(module.training)


def _computes(layer: ConvOrLinear, name: str, node: fx.Node, read: Mapping[str, Any]) -> bool:
    """Whether a call of the layer is the product but for a bias that comes from elsewhere."""
    matrix_product = node.target not in CALLS
    if not isinstance(read["input"], fx.Node) or (matrix_product and not isinstance(layer, nn.Linear)):
        return False
    own_bias = _owner(read["bias"], "bias") == name
    if own_bias != (layer.bias is not None) or (not own_bias and isinstance(layer, Conv) and read["bias"] is not None):
        return False
    if matrix_product or isinstance(layer, nn.Linear):
        return matrix_product or node.target is FUNCTIONS[nn.Linear]
    configured = {key: getattr(layer, key) for key in read if key not in ("input", "weight", "bias")}
    return (
        node.target is FUNCTIONS[stock_type(layer)]
        and layer.padding_mode == "zeros"
        and all(_same(read[key], value) for key, value in configured.items())
    )


def _same(given: Any, configured: Any) -> bool:
    """Whether an option of a function, a number for all axes perhaps, is that of a conv."""
    if isinstance(given, int) and isinstance(configured, tuple):
        given = (given,) * len(configured)
    return bool((tuple(given) if isinstance(given, (list, tuple)) else given) == configured)


def _replace(node: fx.Node, name: str, read: Mapping[str, Any]) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_module(name, (read["input"],))
        if read["bias"] is not None and _owner(read["bias"], "bias") != name:
            new = graph.call_function(operator.add, (new, read["bias"]))
    node.replace_all_uses_with(new)
    operands = [n for n in node.all_input_nodes if n.op != "placeholder" and n is not read["input"]]
    graph.erase_node(node)
    for operand in operands:
        if not operand.users and operand.op != "get_attr" and _transposes(operand):
            graph.erase_node(operand)
