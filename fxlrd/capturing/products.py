"""Which functions of a Dynamo graph are calls of layers: of stock ones, and of layers in other clothes.

A stock module's own forward is known by its class. A module of another class counts if its call is one product of its
input and its weight, and besides nothing but reshaping and the sum with its bias: a subclass that calls `F.linear`,
``x @ W.T + b``, the ``addmm`` of GPT-2's Conv1D. So `fxlrd.compress`, which runs the modules themselves
(`fxlrd.layers.stand_ins`), takes the same ones for layers. Which product it is, small random matrices show.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxlrd.capturing.functions import arguments, is_stock_call, module_of
from fxlrd.layers.functions import CALLS
from fxlrd.layers.stand_ins import linear_around

_PRODUCTS = {torch.addmm, torch.matmul, torch.mm, torch.einsum, torch.functional.einsum, operator.matmul}
_TRANSPOSITIONS = {"t", "transpose", "permute", "numpy_T", "T", "mT", "swapaxes", "movedim"}
_RESHAPING = {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem"}
_SUMS = {operator.add, operator.iadd, torch.add}
_ROWS, _COLUMNS = 5, 7
"""The size of the matrices that stand in for a weight: not square, so that a transposed one shows."""


@dataclass(frozen=True)
class LayerCall:
    """A function that is the call of a layer, or of a BatchNorm.

    Attributes:
        node: the function.
        module: the layer, around the weights of the graph.
        input: the node of its input.
        weights: the names of the nodes of its weights.
    """

    node: fx.Node
    module: nn.Module
    input: fx.Node
    weights: tuple[str, ...]


def layer_calls(gm: fx.GraphModule, weights: Mapping[str, Tensor]) -> dict[fx.Node, LayerCall]:
    """Return the calls of layers and BatchNorms in a graph of Dynamo's, by their nodes, in the graph's order."""
    lone = _lone_products(gm, weights)
    calls = {}
    for node in gm.graph.nodes:
        call = None
        if node.op == "call_function" and (is_stock_call(node) or (node in lone and node.target in CALLS)):
            call = _stock_call(node, weights)
        elif node in lone:
            call = _linear_call(node, weights)
        if call is not None:
            calls[node] = call
    return calls


def _stock_call(node: fx.Node, weights: Mapping[str, Tensor]) -> LayerCall | None:
    module = module_of(node, weights)
    if module is None:
        return None
    value = arguments(node)["input"]
    return LayerCall(node, module, value, tuple(n.name for n in node.all_input_nodes if n.name in weights))


def _lone_products(gm: fx.GraphModule, weights: Mapping[str, Tensor]) -> set[fx.Node]:
    """Return the products in calls of modules that compute nothing else, and hold no module."""
    by_call: dict[str, list[fx.Node]] = {}
    containers: set[str] = set()
    for node in gm.graph.nodes:
        *outer, inner = [str(key) for key in node.meta.get("nn_module_stack") or {}] or [""]
        containers.update(key.partition("@")[0] for key in outer)
        if inner and node.op in ("call_function", "call_method"):
            by_call.setdefault(inner, []).append(node)
    products = set()
    for key, nodes in by_call.items():
        candidates = [n for n in nodes if n.target in _PRODUCTS or n.target in CALLS]
        if len(candidates) == 1 and key.partition("@")[0] not in containers:
            (product,) = candidates
            if all(n is product or _moves_values_only(n) or _adds_bias(n, weights) for n in nodes):
                products.add(product)
    return products


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def _moves_values_only(node: fx.Node) -> bool:
    """Whether the node gives the values of its input in another shape, or is a size."""
    return _name(node) in _TRANSPOSITIONS | _RESHAPING or not isinstance(node.meta.get("example_value"), Tensor)


def _adds_bias(node: fx.Node, weights: Mapping[str, Tensor]) -> bool:
    added = [weights[n.name] for n in node.all_input_nodes if n.name in weights]
    return node.target in _SUMS and len(node.args) == 2 and len(added) == 1 and added[0].dim() == 1


def _linear_call(node: fx.Node, weights: Mapping[str, Tensor]) -> LayerCall | None:
    """Return the product as the call of a Linear around its weights, or None for one that is none."""
    operands = {n: _untransposed(n, weights) for n in node.all_input_nodes}
    inputs = [n for n, leaf in operands.items() if leaf.name not in weights]
    leaves = [leaf for leaf in dict.fromkeys(operands.values()) if leaf.name in weights]
    tensors = [weights[leaf.name] for leaf in leaves]
    matrices = [leaf for leaf, t in zip(leaves, tensors, strict=True) if t.dim() == 2]
    vectors = [leaf for leaf, t in zip(leaves, tensors, strict=True) if t.dim() == 1]
    plain = all(type(t) is nn.Parameter and t.is_floating_point() for t in tensors)
    if not plain or len(inputs) != 1 or len(matrices) != 1 or len(vectors) > 1 or len(leaves) > 2:
        return None
    for transposed in (False, True):
        if _is_linear(node, inputs[0], matrices[0], vectors, transposed):
            weight, bias = weights[matrices[0].name], weights[vectors[0].name] if vectors else None
            assert isinstance(weight, nn.Parameter)
            assert bias is None or isinstance(bias, nn.Parameter)
            layer = linear_around(weight, bias, transposed)
            return LayerCall(node, layer, inputs[0], tuple(leaf.name for leaf in leaves))
    return None


def _untransposed(node: fx.Node, weights: Mapping[str, Tensor]) -> fx.Node:
    """Return the weight that a node transposes, or the node itself."""
    leaf = node
    while leaf.op in ("call_function", "call_method") and _name(leaf) in _TRANSPOSITIONS and leaf.all_input_nodes:
        leaf = leaf.all_input_nodes[0]
    return leaf if leaf.name in weights else node


def _is_linear(node: fx.Node, value: fx.Node, matrix: fx.Node, vectors: list[fx.Node], transposed: bool) -> bool:
    example = value.meta.get("example_value")
    if not isinstance(example, Tensor):
        return False
    c_in, c_out = (_ROWS, _COLUMNS) if transposed else (_COLUMNS, _ROWS)
    generator = torch.Generator().manual_seed(0)
    shapes = {value: (2,) * (example.dim() - 1) + (c_in,), matrix: (_ROWS, _COLUMNS)} | dict.fromkeys(vectors, (c_out,))
    values = {n: torch.rand(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    weight = values[matrix].mT if transposed else values[matrix]
    expected = F.linear(values[value], weight, values[vectors[0]] if vectors else None)
    try:
        actual = _evaluate(node, values)
    except Exception:  # matrices that do not fit
        return False
    return isinstance(actual, Tensor) and actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9)


def _evaluate(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Any:
    if node in values:
        return values[node]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, values))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
